// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// BreakError is the first place where a node's chain does not hold.
type BreakError struct {
	Node    string
	NodeSeq uint64
	Err     error
}

func (e *BreakError) Error() string {
	return fmt.Sprintf("node %s: record %d: %v", e.Node, e.NodeSeq, e.Err)
}

// Unwrap answers what is wrong with the record.
func (e *BreakError) Unwrap() error { return e.Err }

// Verify walks a node's records from the first to the watermark and recomputes
// the hash chain: every number is there, continues the one before and has the
// content that the node signed for, and the last one is the head. It answers
// how many records it has read.
//
// Errors: [ErrNoNode]; [*BreakError] for the first break.
func (r *Reader) Verify(ctx context.Context, node string) (uint64, error) {
	var id int64
	var want Mark
	var top uint64
	row := r.db.QueryRowContext(ctx, `SELECT n.id, n.watermark, n.head,
	  (SELECT coalesce(max(node_seq), 0) FROM records WHERE node = n.id) FROM nodes n WHERE n.node_id = ?`, node)
	if err := row.Scan(&id, &want.Seq, &want.Hash, &top); err != nil {
		return 0, fmt.Errorf("verify node %s: %w", node, classify(noNode(err)))
	}
	const query = `SELECT ` + recordColumns + ` FROM records r INDEXED BY records_node
	  CROSS JOIN tenants t ON t.id = r.tenant CROSS JOIN sources s ON s.id = r.source
	  WHERE r.node = ? AND r.node_seq > ? AND r.node_seq <= ? ORDER BY r.node_seq`
	at := Mark{Hash: usagev1.ZeroHash()}
	for at.Seq < want.Seq {
		page, err := r.page(ctx, query, id, int64(at.Seq), int64(min(at.Seq+window, want.Seq)))
		if err != nil {
			return at.Seq, fmt.Errorf("verify node %s: %w", node, classify(err))
		}
		if len(page) == 0 {
			return at.Seq, &BreakError{Node: node, NodeSeq: at.Seq + 1, Err: errors.New("is missing")}
		}
		for _, rec := range page {
			if err := usagev1.VerifyChain(at.Seq, at.Hash, rec); err != nil {
				return at.Seq, &BreakError{Node: node, NodeSeq: at.Seq + 1, Err: err}
			}
			at = Mark{Seq: rec.NodeSeq, Hash: rec.Hash}
		}
	}
	if !bytes.Equal(at.Hash, want.Hash) {
		return at.Seq, &BreakError{Node: node, NodeSeq: at.Seq, Err: errors.New("is not the head of the chain")}
	}
	if top != want.Seq {
		return at.Seq, &BreakError{Node: node, NodeSeq: top, Err: fmt.Errorf("is past the watermark %d", want.Seq)}
	}
	return at.Seq, nil
}

// checkHeads makes sure that every node's last record is there and is the head
// of its chain. It is quick; Verify reads everything.
func (r *Reader) checkHeads(ctx context.Context) error {
	var node string
	err := r.db.QueryRowContext(ctx, `SELECT n.node_id FROM nodes n
	  LEFT JOIN records r ON r.node = n.id AND r.node_seq = n.watermark
	  WHERE r.hash IS NOT n.head LIMIT 1`).Scan(&node)
	switch {
	case err == nil:
		return fmt.Errorf("%w: the last record of node %s is not the head of its chain", ErrCorrupt, node)
	case errors.Is(noNode(err), ErrNoNode):
		return nil
	}
	return classify(err)
}

func noNode(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNoNode
	}
	return err
}
