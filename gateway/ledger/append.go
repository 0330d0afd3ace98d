// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// maxGroup bounds the records that one transaction commits for several callers.
const maxGroup = 8 * MaxRecords

// batch is one call of Append while it waits. Its result is guarded by
// Ledger.writer.
type batch struct {
	node    string
	records []*usagev1.Record
	refused error // found before the ledger was asked
	done    bool
	mark    Mark
	err     error
}

// Append adds the records to the node's and answers its watermark. The records
// are contiguous in node_seq; those at or below the watermark must be in the
// ledger already, with the same content, and change nothing.
//
// A call that has begun to wait for the disk is not cut short by ctx: the
// answer is what happened. Concurrent calls share one transaction.
//
// Errors: [ErrInvalid] names the record that is malformed; [*GapError];
// [*ConflictError]; [ErrFull] and [ErrBusy], after which nothing was kept and the
// call may be repeated; [ErrFailed].
func (l *Ledger) Append(ctx context.Context, node string, records []*usagev1.Record) (Mark, error) {
	b := &batch{node: node, records: records}
	if err := checkBatch(node, records); err != nil {
		if !errors.Is(err, ErrConflict) {
			return Mark{}, err
		}
		b.refused = err
	}
	if err := ctx.Err(); err != nil {
		return Mark{}, err
	}
	l.mu.Lock()
	l.queue = append(l.queue, b)
	l.mu.Unlock()

	// Whoever gets the lock first commits for everybody in the queue; the
	// others find their answer when they get it.
	l.writer.Lock()
	defer l.writer.Unlock()
	for !b.done {
		l.commit(l.takeGroup())
	}
	return b.mark, b.err
}

// takeGroup takes the oldest batches, at least one, at most maxGroup records.
func (l *Ledger) takeGroup() []*batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, size := 0, 0
	for n < len(l.queue) && (n == 0 || size+len(l.queue[n].records) <= maxGroup) {
		size += len(l.queue[n].records)
		n++
	}
	group := l.queue[:n:n]
	if l.queue = l.queue[n:]; len(l.queue) == 0 {
		l.queue = nil
	}
	return group
}

// checkBatch checks what can be checked without the ledger.
func checkBatch(node string, records []*usagev1.Record) error {
	if len(records) == 0 || len(records) > MaxRecords {
		return fmt.Errorf("%w: %d records, want 1 to %d", ErrInvalid, len(records), MaxRecords)
	}
	for i, r := range records {
		if err := usagev1.Validate(r); err != nil {
			return fmt.Errorf("%w: record %d: %w", ErrInvalid, i, err)
		}
		if source, _, _ := usagev1.ParseSource(r.Source); source != node {
			return fmt.Errorf("%w: record %d: %s: source %q is not of node %s", ErrInvalid, i, r.Id, r.Source, node)
		}
		if r.NodeSeq == 0 || r.NodeSeq > math.MaxInt64 || r.NodeSeq != records[0].NodeSeq+uint64(i) {
			return fmt.Errorf("%w: record %d: %s: node_seq %d does not follow the record before", ErrInvalid, i, r.Id, r.NodeSeq)
		}
		if r.Corrects == r.Id {
			return fmt.Errorf("%w: record %d: %s: corrects itself", ErrInvalid, i, r.Id)
		}
		if len(r.PrevHash) != usagev1.HashLen || len(r.Hash) != usagev1.HashLen {
			return fmt.Errorf("%w: record %d: %s: no prev_hash or no hash", ErrInvalid, i, r.Id)
		}
		if !bytes.Equal(r.Hash, usagev1.Hash(r.PrevHash, r)) {
			return conflict(node, KindContent, r, nil)
		}
		if i > 0 && !bytes.Equal(r.PrevHash, records[i-1].Hash) {
			return conflict(node, KindChain, r, records[i-1].Hash)
		}
	}
	return nil
}

func conflict(node, kind string, r *usagev1.Record, have []byte) error {
	return &refusal{
		ConflictError: ConflictError{
			Node: node, Kind: kind, NodeSeq: r.NodeSeq, Source: r.Source, RecordID: r.Id, Have: have, Got: r.Hash,
		},
		record: r,
	}
}

// refusal is a conflict on its way into the ledger.
type refusal struct {
	ConflictError
	record *usagev1.Record
}

// commit answers every batch of the group.
//
// +checklocks:l.writer
func (l *Ledger) commit(group []*batch) {
	err := l.broken
	if err == nil {
		if err = l.transact(group); err != nil {
			err = l.recover(err)
		}
	}
	for _, b := range group {
		if err != nil {
			b.mark, b.err = Mark{}, err
		}
		b.done = true
	}
}

// recover ends a transaction that went wrong and decides whether the ledger can
// go on.
//
// +checklocks:l.writer
func (l *Ledger) recover(err error) error {
	// SQLite may have rolled back by itself; then this one finds nothing to do.
	_, _ = l.stmts.rollback.Exec()
	err = fmt.Errorf("append to ledger: %w", classify(err))
	if errors.Is(err, ErrFull) || errors.Is(err, ErrBusy) {
		return err
	}
	l.broken = fmt.Errorf("%w: %w", ErrFailed, err)
	close(l.failed)
	return l.broken
}

// transact commits the group in one transaction, each batch whole or not at all.
//
// +checklocks:l.writer
func (l *Ledger) transact(group []*batch) error {
	now := time.Now().UnixNano()
	if err := l.fault("begin"); err != nil {
		return err
	}
	if _, err := l.stmts.begin.Exec(); err != nil {
		return err
	}
	for _, b := range group {
		if _, err := l.stmts.savepoint.Exec(); err != nil {
			return err
		}
		mark, refused, err := l.apply(b, now)
		if err != nil {
			return err
		}
		b.mark, b.err = mark, refused
		if refused != nil {
			if _, err := l.stmts.rollbackTo.Exec(); err != nil {
				return err
			}
			if err := l.keepConflict(b, now); err != nil {
				return err
			}
		}
		if _, err := l.stmts.release.Exec(); err != nil {
			return err
		}
	}
	if err := l.fault("commit"); err != nil {
		return err
	}
	if _, err := l.stmts.commit.Exec(); err != nil {
		return err
	}
	return l.fault("committed")
}

// keepConflict adds the batch's refusal to the conflicts table, if it is one,
// and strips what only this package needs from the error.
func (l *Ledger) keepConflict(b *batch, now int64) error {
	var r *refusal
	if !errors.As(b.err, &r) {
		return nil
	}
	b.err = &r.ConflictError
	record, err := proto.Marshal(r.record)
	if err != nil {
		return err
	}
	_, err = l.stmts.conflict.Exec(now, r.Node, r.Kind, int64(r.NodeSeq), r.Source, r.RecordID, r.Have, r.Got, record)
	return err
}

// apply writes one batch inside the open transaction. It answers the new
// watermark, or why the batch is refused, or an error of the database.
func (l *Ledger) apply(b *batch, now int64) (_ Mark, refused, err error) {
	if b.refused != nil {
		return Mark{}, b.refused, nil
	}
	node, mark, err := l.node(b.node)
	if err != nil {
		return Mark{}, nil, err
	}
	if first := b.records[0].NodeSeq; first > mark.Seq+1 {
		return Mark{}, &GapError{Node: b.node, First: first, Mark: mark}, nil
	}
	known := min(mark.Seq+1-b.records[0].NodeSeq, uint64(len(b.records)))
	for _, r := range b.records[:known] {
		var have []byte
		if err := l.stmts.known.QueryRow(node, int64(r.NodeSeq)).Scan(&have); err != nil {
			return Mark{}, nil, fmt.Errorf("read node_seq %d of node %s: %w", r.NodeSeq, b.node, err)
		}
		if !bytes.Equal(have, r.Hash) {
			return Mark{}, conflict(b.node, KindSequence, r, have), nil
		}
	}
	fresh := b.records[known:]
	if len(fresh) == 0 {
		return mark, nil, nil
	}
	if !bytes.Equal(fresh[0].PrevHash, mark.Hash) {
		return Mark{}, conflict(b.node, KindChain, fresh[0], mark.Hash), nil
	}
	if node == 0 {
		if node, err = insertID(l.stmts.addNode, b.node, mark.Hash, now); err != nil {
			return Mark{}, nil, err
		}
	}
	if refused, err := l.insert(node, b.node, fresh, now); refused != nil || err != nil {
		return Mark{}, refused, err
	}
	last := fresh[len(fresh)-1]
	mark = Mark{Seq: last.NodeSeq, Hash: last.Hash}
	_, err = l.stmts.setNode.Exec(int64(mark.Seq), mark.Hash, now, node)
	return mark, nil, err
}

// node answers the node's row; id 0 if it has none.
func (l *Ledger) node(name string) (id int64, _ Mark, _ error) {
	var seq int64
	var head []byte
	switch err := l.stmts.node.QueryRow(name).Scan(&id, &seq, &head); {
	case errors.Is(err, sql.ErrNoRows):
		return 0, Mark{Hash: usagev1.ZeroHash()}, nil
	case err != nil:
		return 0, Mark{}, fmt.Errorf("read node %s: %w", name, err)
	}
	return id, Mark{Seq: uint64(seq), Hash: head}, nil
}

// insert adds records that the ledger does not have.
func (l *Ledger) insert(node int64, name string, records []*usagev1.Record, now int64) (refused, err error) {
	sources, tenants := map[string]int64{}, map[string]int64{}
	for _, r := range records {
		source, err := intern(sources, r.Source, l.stmts.source, l.stmts.addSource)
		if err != nil {
			return nil, err
		}
		tenant, err := intern(tenants, r.Tenant, l.stmts.tenant, l.stmts.addTenant)
		if err != nil {
			return nil, err
		}
		if r.Corrects != "" {
			var known bool
			if err := l.stmts.corrected.QueryRow(r.Corrects, node).Scan(&known); err != nil {
				return nil, err
			}
			if !known {
				return fmt.Errorf("%w: %s corrects %s, which node %s has not sent", ErrInvalid, r.Id, r.Corrects, name), nil
			}
		}
		res, err := l.stmts.insert.Exec(insertArgs(r, node, source, tenant, now)...)
		if err != nil {
			return nil, fmt.Errorf("insert %s: %w", r.Id, err)
		}
		if n, err := res.RowsAffected(); err != nil {
			return nil, err
		} else if n == 1 {
			continue
		}
		var have []byte
		if err := l.stmts.byID.QueryRow(r.Id, source).Scan(&have); err != nil {
			return nil, err
		}
		return conflict(name, KindID, r, have), nil
	}
	return nil, nil
}

func insertArgs(r *usagev1.Record, node, source, tenant, now int64) []any {
	args := []any{
		node, int64(r.NodeSeq), r.Id, source, r.PrevHash, r.Hash, tenant, r.Sandbox, r.SandboxName,
		r.WorkloadRef, int64(r.PolicyRev), r.Meter, r.StartNs, r.EndNs, r.MonoNs, int64(r.Delta), int64(r.Cumulative),
	}
	if res := r.Resource; res != nil {
		args = append(args, res.GpuUuid, res.MigUuid, res.Profile, int64(res.FractionNum), int64(res.FractionDen))
	} else {
		args = append(args, nil, nil, nil, nil, nil)
	}
	return append(args, int64(r.Quality), sql.NullString{String: r.Corrects, Valid: r.Corrects != ""}, now)
}

// intern answers the number of a text in its table, adding it if it is new.
func intern(memo map[string]int64, text string, find, add *sql.Stmt) (int64, error) {
	if id, ok := memo[text]; ok {
		return id, nil
	}
	var id int64
	err := find.QueryRow(text).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		id, err = insertID(add, text)
	}
	if err != nil {
		return 0, fmt.Errorf("look up %q: %w", text, err)
	}
	memo[text] = id
	return id, nil
}

func insertID(stmt *sql.Stmt, args ...any) (int64, error) {
	res, err := stmt.Exec(args...)
	if err != nil {
		return 0, err
	}
	return res.LastInsertId()
}
