// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
)

// Verify walks the hash chain of one node, or of all if node is empty, and
// writes a line for each. A break is an error, after all nodes were looked at.
// The gateway may run meanwhile.
func Verify(ctx context.Context, cfg config.Config, node string, w io.Writer) error {
	r, err := ledger.OpenReader(cfg.DataDir)
	if err != nil {
		return err
	}
	defer r.Close()
	names := []string{node}
	if node == "" {
		nodes, err := r.Nodes(ctx)
		if err != nil {
			return err
		}
		names = names[:0]
		for _, n := range nodes {
			names = append(names, n.ID)
		}
	}
	bad := 0
	var first error
	for _, name := range names {
		records, err := r.Verify(ctx, name)
		var broken *ledger.BreakError
		switch {
		case errors.As(err, &broken):
			fmt.Fprintf(w, "%s: broken at record %d: %v\n", name, broken.NodeSeq, broken.Err)
			bad++
			if first == nil {
				first = err
			}
		case err != nil:
			return err
		default:
			fmt.Fprintf(w, "%s: %d records, chain whole\n", name, records)
		}
	}
	if bad > 0 {
		return fmt.Errorf("chain of %d of %d nodes is broken, first: %w", bad, len(names), first)
	}
	return nil
}
