// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"time"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const (
	// MaxRows is the most rows that Usage answers; they fit in one message.
	MaxRows = 10_000

	// window is how many records are read at a time: no read transaction lasts
	// longer, so a slow caller does not keep the WAL from being emptied.
	window = 2000

	// maxSeqs bounds the positions that Records holds in memory (8 bytes each).
	maxSeqs = 1 << 20
)

// Reader answers questions. Any number may be open on one directory, in this
// process and in others. It is safe for concurrent use.
type Reader struct {
	path string
	db   *sql.DB
}

// OpenReader opens the ledger in dir for reading only.
//
// Errors: [ErrNewerSchema], [ErrNotLedger], [ErrCorrupt].
func OpenReader(dir string) (*Reader, error) {
	path := filepath.Join(dir, fileName)
	db, err := sql.Open("sqlite", dsn(path, "ro", "busy_timeout(5000)", "query_only(1)", "cache_size(-16384)"))
	if err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", path, err)
	}
	db.SetMaxOpenConns(4)
	version, err := schemaVersion(context.Background(), db)
	if err == nil && version != len(migrations) {
		err = fmt.Errorf("%w: schema %d, want %d; start the gateway once", ErrNotLedger, version, len(migrations))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open ledger %s: %w", path, classify(err)), db.Close())
	}
	return &Reader{path: path, db: db}, nil
}

// Close closes the reader.
func (r *Reader) Close() error { return r.db.Close() }

// Filter chooses records; a zero field chooses all.
type Filter struct {
	Tenant         string // this tenant and all below it
	Sandbox        string
	Meter          string
	StartNs, EndNs int64 // the record's interval begins in [StartNs, EndNs)
}

// where answers the joins and conditions for the filter, with r for records and
// t for tenants.
func (f Filter) where() (from, cond string, args []any) {
	conds := []string{"1"}
	// CROSS JOIN fixes the order: SQLite reads the left table first. A
	// sandbox's records are found by their ids, which begin with it; those of a
	// subtree tenant by tenant, each from the first of its interval.
	if f.Sandbox != "" {
		from = "records r INDEXED BY records_id CROSS JOIN tenants t ON t.id = r.tenant"
		conds = append(conds, "r.id >= ? AND r.id < ? AND r.sandbox = ?")
		args = append(args, f.Sandbox+"/", f.Sandbox+"0", f.Sandbox)
	} else {
		from = "tenants t CROSS JOIN records r INDEXED BY records_tenant ON r.tenant = t.id"
	}
	if f.Tenant != "" {
		// '0' is the character after '/'.
		conds = append(conds, "(t.path = ? OR (t.path >= ? AND t.path < ?))")
		args = append(args, f.Tenant, f.Tenant+"/", f.Tenant+"0")
	}
	if f.Meter != "" {
		conds = append(conds, "r.meter = ?")
		args = append(args, f.Meter)
	}
	if f.StartNs != 0 {
		conds = append(conds, "r.start_ns >= ?")
		args = append(args, f.StartNs)
	}
	if f.EndNs != 0 {
		conds = append(conds, "r.start_ns < ?")
		args = append(args, f.EndNs)
	}
	return from, strings.Join(conds, " AND "), args
}

// Row is the sum of one meter of one tenant or sandbox.
type Row struct {
	Tenant              string
	Sandbox             string // only by sandbox, as is SandboxName
	SandboxName         string
	Meter               string
	Total               *big.Int
	Records, GapRecords uint64
	StartNs, EndNs      int64 // of the first and the last interval
}

// notReplaced leaves out records that a later one corrects.
const notReplaced = `NOT EXISTS (SELECT 1 FROM records c WHERE c.corrects = r.id AND c.node = r.node)`

// Usage sums the records that f chooses, by tenant and meter or by tenant,
// sandbox and meter, in that order.
//
// Errors: [ErrTooMany] if there are more than [MaxRows] rows.
func (r *Reader) Usage(ctx context.Context, f Filter, bySandbox bool) (_ []Row, err error) {
	from, cond, args := f.where()
	names, group := "'', ''", "t.path, r.meter"
	if bySandbox {
		names, group = "r.sandbox, max(r.sandbox_name)", "t.path, r.sandbox, r.meter"
	}
	// Each delta is 64 unsigned bits; the halves are summed apart.
	query := fmt.Sprintf(`SELECT t.path, %s, r.meter,
	  sum((r.delta >> 32) & 4294967295), sum(r.delta & 4294967295),
	  count(*), sum(r.quality = %d), min(r.start_ns), max(r.end_ns)
	  FROM %s WHERE %s AND %s GROUP BY %s ORDER BY %s LIMIT %d`,
		names, usagev1.Quality_QUALITY_GAP, from, cond, notReplaced, group, group, MaxRows+1)
	rows, err := r.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("sum usage: %w", classify(err))
	}
	defer rows.Close()
	var out []Row
	for rows.Next() {
		var row Row
		var hi, lo int64
		if err := rows.Scan(&row.Tenant, &row.Sandbox, &row.SandboxName, &row.Meter, &hi, &lo,
			&row.Records, &row.GapRecords, &row.StartNs, &row.EndNs); err != nil {
			return nil, fmt.Errorf("sum usage: %w", err)
		}
		if len(out) == MaxRows {
			return nil, fmt.Errorf("%w: more than %d", ErrTooMany, MaxRows)
		}
		row.Total = new(big.Int).Lsh(big.NewInt(hi), 32)
		row.Total.Add(row.Total, big.NewInt(lo))
		out = append(out, row)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("sum usage: %w", classify(err))
	}
	return out, nil
}

const recordColumns = `r.node_seq, r.id, s.source, r.prev_hash, r.hash, t.path, r.sandbox, r.sandbox_name,
  r.workload_ref, r.policy_rev, r.meter, r.start_ns, r.end_ns, r.mono_ns, r.delta, r.cumulative,
  r.gpu_uuid, r.mig_uuid, r.profile, r.fraction_num, r.fraction_den, r.quality, r.corrects`

func scanRecord(scan func(...any) error) (*usagev1.Record, error) {
	var r usagev1.Record
	var seq, rev, delta, cumulative int64
	var gpu, mig, profile, corrects sql.NullString
	var num, den sql.NullInt64
	if err := scan(&seq, &r.Id, &r.Source, &r.PrevHash, &r.Hash, &r.Tenant, &r.Sandbox, &r.SandboxName,
		&r.WorkloadRef, &rev, &r.Meter, &r.StartNs, &r.EndNs, &r.MonoNs, &delta, &cumulative,
		&gpu, &mig, &profile, &num, &den, &r.Quality, &corrects); err != nil {
		return nil, err
	}
	r.NodeSeq, r.PolicyRev, r.Delta, r.Cumulative = uint64(seq), uint64(rev), uint64(delta), uint64(cumulative)
	r.Corrects = corrects.String
	if den.Valid {
		r.Resource = &usagev1.Resource{
			GpuUuid: gpu.String, MigUuid: mig.String, Profile: profile.String,
			FractionNum: uint32(num.Int64), FractionDen: uint32(den.Int64),
		}
	}
	return &r, nil
}

// Records calls yield for each record that f chooses, in ledger order, until it
// answers an error, which is returned. Records that arrive after the call has
// begun are left out.
func (r *Reader) Records(ctx context.Context, f Filter, yield func(*usagev1.Record) error) error {
	var last int64
	if err := r.db.QueryRowContext(ctx, "SELECT coalesce(max(seq), 0) FROM records").Scan(&last); err != nil {
		return fmt.Errorf("list records: %w", classify(err))
	}
	if f != (Filter{}) {
		seqs, err := r.seqs(ctx, f, last)
		if err != nil {
			return fmt.Errorf("list records: %w", classify(err))
		}
		if len(seqs) <= maxSeqs {
			return r.recordsAt(ctx, seqs, yield)
		}
	}
	// So many that reading past the others costs less than remembering these.
	_, cond, args := f.where()
	query := fmt.Sprintf(`SELECT %s FROM records r NOT INDEXED CROSS JOIN tenants t ON t.id = r.tenant
	  CROSS JOIN sources s ON s.id = r.source
	  WHERE %s AND r.seq > ? AND r.seq <= ? ORDER BY r.seq`, recordColumns, cond)
	for lo := int64(0); lo < last; lo += window {
		page, err := r.page(ctx, query, append(slices.Clip(args), lo, min(lo+window, last))...)
		if err != nil {
			return fmt.Errorf("list records: %w", classify(err))
		}
		for _, rec := range page {
			if err := yield(rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// seqs answers where the records are that f chooses, sorted; maxSeqs+1 of them
// if there are too many to hold.
func (r *Reader) seqs(ctx context.Context, f Filter, last int64) ([]int64, error) {
	from, cond, args := f.where()
	rows, err := r.db.QueryContext(ctx, fmt.Sprintf(`SELECT r.seq FROM %s WHERE %s AND r.seq <= ? LIMIT %d`,
		from, cond, maxSeqs+1), append(args, last)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var seqs []int64
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return nil, err
		}
		seqs = append(seqs, seq)
	}
	slices.Sort(seqs)
	return seqs, rows.Err()
}

func (r *Reader) recordsAt(ctx context.Context, seqs []int64, yield func(*usagev1.Record) error) error {
	const query = `SELECT ` + recordColumns + ` FROM json_each(?) j CROSS JOIN records r ON r.seq = j.value
	  CROSS JOIN tenants t ON t.id = r.tenant CROSS JOIN sources s ON s.id = r.source ORDER BY r.seq`
	for chunk := range slices.Chunk(seqs, window) {
		list, err := json.Marshal(chunk)
		if err != nil {
			return err
		}
		page, err := r.page(ctx, query, string(list))
		if err != nil {
			return fmt.Errorf("list records: %w", classify(err))
		}
		for _, rec := range page {
			if err := yield(rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// page reads the records of one query into memory.
func (r *Reader) page(ctx context.Context, query string, args ...any) ([]*usagev1.Record, error) {
	rows, err := r.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []*usagev1.Record
	for rows.Next() {
		rec, err := scanRecord(rows.Scan)
		if err != nil {
			return nil, err
		}
		out = append(out, rec)
	}
	return out, rows.Err()
}

// Node is how far one node's records have arrived.
type Node struct {
	ID       string
	Mark     Mark
	LastPush time.Time // when its newest record was committed, gateway clock
}

// Nodes lists the nodes that have records, by id.
func (r *Reader) Nodes(ctx context.Context) ([]Node, error) {
	rows, err := r.db.QueryContext(ctx, "SELECT node_id, watermark, head, last_push_ns FROM nodes ORDER BY node_id")
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", classify(err))
	}
	defer rows.Close()
	var out []Node
	for rows.Next() {
		var n Node
		var pushed int64
		if err := rows.Scan(&n.ID, &n.Mark.Seq, &n.Mark.Hash, &pushed); err != nil {
			return nil, fmt.Errorf("list nodes: %w", err)
		}
		n.LastPush = time.Unix(0, pushed).UTC()
		out = append(out, n)
	}
	return out, rows.Err()
}

// Watermark answers how far a node's records have arrived; the zero mark with
// 32 zero bytes if it has none.
func (r *Reader) Watermark(ctx context.Context, node string) (Mark, error) {
	var m Mark
	err := r.db.QueryRowContext(ctx, "SELECT watermark, head FROM nodes WHERE node_id = ?", node).Scan(&m.Seq, &m.Hash)
	if errors.Is(err, sql.ErrNoRows) {
		return Mark{Hash: usagev1.ZeroHash()}, nil
	}
	if err != nil {
		return Mark{}, fmt.Errorf("read watermark of node %s: %w", node, classify(err))
	}
	return m, nil
}

// Conflict is a record that was refused, and how often.
type Conflict struct {
	ConflictError
	First, Last time.Time // gateway clock
	Count       uint64
}

// Conflicts lists the refused records, the latest refusal first, at most limit.
func (r *Reader) Conflicts(ctx context.Context, limit int) ([]Conflict, error) {
	rows, err := r.db.QueryContext(ctx, `SELECT first_ns, last_ns, count, node_id, kind, node_seq, source, record_id,
	  have_hash, got_hash FROM conflicts ORDER BY last_ns DESC, seq DESC LIMIT ?`, limit)
	if err != nil {
		return nil, fmt.Errorf("list conflicts: %w", classify(err))
	}
	defer rows.Close()
	var out []Conflict
	for rows.Next() {
		var c Conflict
		var first, last int64
		if err := rows.Scan(&first, &last, &c.Count, &c.Node, &c.Kind, &c.NodeSeq, &c.Source, &c.RecordID,
			&c.Have, &c.Got); err != nil {
			return nil, fmt.Errorf("list conflicts: %w", err)
		}
		c.First, c.Last = time.Unix(0, first).UTC(), time.Unix(0, last).UTC()
		out = append(out, c)
	}
	return out, rows.Err()
}
