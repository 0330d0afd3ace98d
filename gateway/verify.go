// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
)

// maxConflicts is how many refused records Verify names.
const maxConflicts = 100

// Verify walks the hash chain of one node, or of all if node is empty, and
// writes a line for each, and one for each of the latest refused records. A
// break is an error, after all nodes were looked at; a refused record is not in
// the ledger and is none. The gateway may run meanwhile.
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
	conflicts, err := r.Conflicts(ctx, maxConflicts)
	if err != nil {
		return err
	}
	for _, c := range conflicts {
		if node == "" || node == c.Node {
			fmt.Fprintf(w, "%s: refused (%dx), last at %s: %v\n", c.Node, c.Count, c.Last.Format(time.RFC3339), &c.ConflictError)
		}
	}
	if bad > 0 {
		return fmt.Errorf("chain of %d of %d nodes is broken, first: %w", bad, len(names), first)
	}
	return nil
}
