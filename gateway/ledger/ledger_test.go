// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"database/sql"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	"github.com/bulkheadhq/bulkhead/gateway/ledger/ledgertest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

func open(t testing.TB, dir string) *Ledger {
	t.Helper()
	l, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func appendOK(t testing.TB, l *Ledger, node string, records []*usagev1.Record) Mark {
	t.Helper()
	mark, err := l.Append(t.Context(), node, records)
	if err != nil {
		t.Fatal(err)
	}
	return mark
}

func records(t testing.TB, r *Reader, f Filter) []*usagev1.Record {
	t.Helper()
	var out []*usagev1.Record
	if err := r.Records(t.Context(), f, func(rec *usagev1.Record) error {
		out = append(out, rec)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func totals(t testing.TB, r *Reader, f Filter, bySandbox bool) map[gatewaytest.Key]*big.Int {
	t.Helper()
	rows, err := r.Usage(t.Context(), f, bySandbox)
	if err != nil {
		t.Fatal(err)
	}
	out := map[gatewaytest.Key]*big.Int{}
	for _, row := range rows {
		out[gatewaytest.Key{Tenant: row.Tenant, Sandbox: row.Sandbox, Meter: row.Meter}] = row.Total
	}
	return out
}

var bigInts = cmp.Comparer(func(a, b *big.Int) bool { return a.Cmp(b) == 0 })

// Every field, with its extreme values, comes back as it was sent.
func TestRecordsComeBackUnchanged(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	n.Add(&usagev1.Record{Delta: 7})
	n.Add(&usagev1.Record{Delta: ^uint64(0), PolicyRev: ^uint64(0), Tenant: "ä/ö", SandboxName: "name\x00x",
		WorkloadRef: "ref", StartNs: -1 << 63, EndNs: 1<<63 - 1, MonoNs: 1<<63 - 1})
	n.Add(&usagev1.Record{Resource: &usagev1.Resource{GpuUuid: "g", MigUuid: "m", Profile: "1g.5gb",
		FractionNum: 1<<32 - 1, FractionDen: 1<<32 - 1}, Quality: usagev1.Quality_QUALITY_RECONSTRUCTED})
	n.Add(&usagev1.Record{Corrects: n.Sent[0].Id, Source: usagev1.Source("n1", "boot-2")})
	mark := appendOK(t, l, "n1", n.Sent)
	if diff := cmp.Diff(Mark{4, n.Head()}, mark); diff != "" {
		t.Errorf("mark (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(n.Sent, records(t, l.Reader, Filter{}), protocmp.Transform()); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	if got, err := l.Verify(t.Context(), "n1"); err != nil || got != 4 {
		t.Errorf("verify: got %d, %v, want 4", got, err)
	}
}

func TestDuplicateBatchChangesNothing(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(10)
	appendOK(t, l, "n1", n.Sent)
	before := dump(t, dir)
	for _, part := range [][]*usagev1.Record{n.Sent, n.Sent[:3], n.Sent[4:7], n.Sent[9:]} {
		if got := appendOK(t, l, "n1", part); got.Seq != 10 {
			t.Errorf("got watermark %d, want 10", got.Seq)
		}
	}
	if diff := cmp.Diff(before, dump(t, dir)); diff != "" {
		t.Errorf("the database changed (-before +after):\n%s", diff)
	}
	// Half known, half new.
	n.Batch(5)
	if got := appendOK(t, l, "n1", n.Sent[7:]); got.Seq != 15 {
		t.Errorf("got watermark %d, want 15", got.Seq)
	}
}

// dump is every row of every table.
func dump(t testing.TB, dir string) []string {
	t.Helper()
	db := rawDB(t, dir)
	var out []string
	for _, table := range []string{"nodes", "sources", "tenants", "records", "conflicts"} {
		rows, err := db.Query("SELECT * FROM " + table)
		if err != nil {
			t.Fatal(err)
		}
		cols, _ := rows.Columns()
		for rows.Next() {
			vals := make([]any, len(cols))
			ptrs := make([]any, len(cols))
			for i := range vals {
				ptrs[i] = &vals[i]
			}
			if err := rows.Scan(ptrs...); err != nil {
				t.Fatal(err)
			}
			out = append(out, table+": "+cmp.Diff(nil, vals))
		}
		rows.Close()
	}
	return out
}

// rawDB opens the file the way any other tool would.
func rawDB(t testing.TB, dir string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	return db
}

func TestReorderedBatchWaitsForTheGap(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(9)
	appendOK(t, l, "n1", n.Sent[:3])
	_, err := l.Append(t.Context(), "n1", n.Sent[6:])
	var gap *GapError
	if !errors.As(err, &gap) || !errors.Is(err, ErrGap) {
		t.Fatalf("got %v, want a gap", err)
	}
	if diff := cmp.Diff(&GapError{Node: "n1", First: 7, Mark: Mark{3, n.Sent[2].Hash}}, gap); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := len(records(t, l.Reader, Filter{})); got != 3 {
		t.Errorf("got %d records, want 3", got)
	}
	appendOK(t, l, "n1", n.Sent[3:6])
	if got := appendOK(t, l, "n1", n.Sent[6:]); got.Seq != 9 {
		t.Errorf("got watermark %d, want 9", got.Seq)
	}
	// The first batch of a node must begin at 1.
	_, err = l.Append(t.Context(), "n2", gatewaytest.NewNode("n2", 1).Batch(3)[1:])
	if !errors.As(err, &gap) || gap.Mark.Seq != 0 {
		t.Errorf("got %v, want a gap at 0", err)
	}
}

func TestConflicts(t *testing.T) {
	// Each row builds a batch that is refused, after 5 records went in.
	rehash := func(r *usagev1.Record) *usagev1.Record {
		r.Hash = usagev1.Hash(r.PrevHash, r)
		return r
	}
	tests := map[string]struct {
		kind  string
		seq   uint64
		batch func(n *gatewaytest.Node) []*usagev1.Record
	}{
		"same id and number, other payload": {KindSequence, 3, func(n *gatewaytest.Node) []*usagev1.Record {
			r := proto.Clone(n.Sent[2]).(*usagev1.Record)
			r.Delta, r.Quality = 1, usagev1.Quality_QUALITY_MEASURED
			r.Cumulative = 1
			return []*usagev1.Record{rehash(r)}
		}},
		"same id, later number": {KindID, 7, func(n *gatewaytest.Node) []*usagev1.Record {
			n.Batch(1)
			n.Add(&usagev1.Record{Id: n.Sent[0].Id, Sandbox: n.Sent[0].Sandbox, Meter: n.Sent[0].Meter})
			return n.Sent[5:]
		}},
		"same id twice in the batch": {KindID, 7, func(n *gatewaytest.Node) []*usagev1.Record {
			r := n.Add(&usagev1.Record{})
			n.Add(&usagev1.Record{Id: r.Id})
			return n.Sent[5:]
		}},
		"a clone's history": {KindSequence, 1, func(*gatewaytest.Node) []*usagev1.Record {
			return gatewaytest.NewNode("n1", 99).Batch(8)
		}},
		"a clone's next record": {KindChain, 6, func(*gatewaytest.Node) []*usagev1.Record {
			return gatewaytest.NewNode("n1", 99).Batch(8)[5:]
		}},
		"chain broken inside": {KindChain, 7, func(n *gatewaytest.Node) []*usagev1.Record {
			n.Batch(2)
			r := proto.Clone(n.Sent[6]).(*usagev1.Record)
			r.PrevHash = n.Sent[0].Hash
			return []*usagev1.Record{n.Sent[5], rehash(r)}
		}},
		"tampered content": {KindContent, 6, func(n *gatewaytest.Node) []*usagev1.Record {
			n.Batch(2)
			r := proto.Clone(n.Sent[5]).(*usagev1.Record)
			r.Tenant = "zeta/other"
			return []*usagev1.Record{r, n.Sent[6]}
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			n := gatewaytest.NewNode("n1", 1)
			n.Batch(5)
			appendOK(t, l, "n1", n.Sent)
			batch := tt.batch(n)
			for range 2 {
				_, err := l.Append(t.Context(), "n1", batch)
				var c *ConflictError
				if !errors.Is(err, ErrConflict) || !errors.As(err, &c) {
					t.Fatalf("got %v, want a conflict", err)
				}
				if c.Kind != tt.kind || c.NodeSeq != tt.seq || c.Node != "n1" {
					t.Errorf("got %+v, want kind %s at %d", c, tt.kind, tt.seq)
				}
			}
			// Nothing of the batch was kept; the conflict was, also after a restart.
			l.Close()
			l = open(t, dir)
			if got := len(records(t, l.Reader, Filter{})); got != 5 {
				t.Errorf("got %d records, want 5", got)
			}
			conflicts, err := l.Conflicts(t.Context(), 10)
			if err != nil {
				t.Fatal(err)
			}
			if len(conflicts) != 1 || conflicts[0].Kind != tt.kind || conflicts[0].Count != 2 {
				t.Errorf("got %+v, want one %s conflict, counted twice", conflicts, tt.kind)
			}
			// The node is not stuck: its true records go on.
			fresh := gatewaytest.NewNode("n1", 1)
			fresh.Batch(5)
			if got := appendOK(t, l, "n1", fresh.Sent); got.Seq != 5 {
				t.Errorf("got watermark %d, want 5", got.Seq)
			}
		})
	}
}

func TestInvalidBatches(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(MaxRecords + 1)
	change := func(f func(*usagev1.Record)) []*usagev1.Record {
		r := proto.Clone(n.Sent[1]).(*usagev1.Record)
		f(r)
		r.Hash = usagev1.Hash(r.PrevHash, r)
		return []*usagev1.Record{n.Sent[0], r}
	}
	tests := map[string]struct {
		node  string
		batch []*usagev1.Record
		want  string
	}{
		"empty":         {"n1", nil, "0 records, want 1 to 1000"},
		"too many":      {"n1", n.Sent, "1001 records, want 1 to 1000"},
		"nil record":    {"n1", []*usagev1.Record{nil}, "record 0"},
		"other node":    {"n2", n.Sent[:1], "is not of node n2"},
		"not in order":  {"n1", []*usagev1.Record{n.Sent[1], n.Sent[0]}, "record 1: " + n.Sent[0].Id + ": node_seq 1"},
		"same twice":    {"n1", []*usagev1.Record{n.Sent[0], n.Sent[0]}, "record 1"},
		"no seq":        {"n1", change(func(r *usagev1.Record) { r.NodeSeq = 0 })[1:], "node_seq 0"},
		"huge seq":      {"n1", change(func(r *usagev1.Record) { r.NodeSeq = 1 << 63 })[1:], "node_seq 9223372036854775808"},
		"no quality":    {"n1", change(func(r *usagev1.Record) { r.Quality = 0 }), "record 1"},
		"no hash":       {"n1", func() []*usagev1.Record { b := change(func(*usagev1.Record) {}); b[1].Hash = nil; return b }(), "no hash"},
		"self":          {"n1", change(func(r *usagev1.Record) { r.Corrects = r.Id }), "corrects itself"},
		"unknown field": {"n1", change(func(r *usagev1.Record) { r.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) }), "record 1"},
		"corrects unknown": {"n1", change(func(r *usagev1.Record) { r.Corrects = "zzzzzzzzzzzz/cpu_ns/1/1" }),
			"corrects zzzzzzzzzzzz/cpu_ns/1/1, which node n1 has not sent"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := l.Append(t.Context(), tt.node, tt.batch)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if got := len(records(t, l.Reader, Filter{})); got != 0 {
		t.Errorf("got %d records, want none", got)
	}
}

func TestAppendOnly(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(3)
	appendOK(t, l, "n1", n.Sent)
	bad := proto.Clone(n.Sent[2]).(*usagev1.Record)
	bad.Tenant = "x"
	l.Append(t.Context(), "n1", []*usagev1.Record{bad})
	db := rawDB(t, dir)
	for _, stmt := range []string{
		"UPDATE records SET delta = 0", "DELETE FROM records", "DELETE FROM conflicts", "DELETE FROM nodes",
		"UPDATE nodes SET watermark = 1", "UPDATE sources SET source = 'x'", "DELETE FROM tenants",
		"UPDATE tenants SET path = 'x'", "DELETE FROM sources",
	} {
		if _, err := db.Exec(stmt); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s: got %v, want a refusal", stmt, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Run("second writer", func(t *testing.T) {
		dir := t.TempDir()
		l := open(t, dir)
		if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrLocked) {
			t.Errorf("got %v, want ErrLocked", err)
		}
		l.Close()
		open(t, dir)
	})
	t.Run("newer schema", func(t *testing.T) {
		dir := t.TempDir()
		open(t, dir).Close()
		if _, err := rawDB(t, dir).Exec("PRAGMA user_version = 99"); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{Dir: dir})
		if !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), "schema 99, this gateway knows up to 1") {
			t.Errorf("got %v, want ErrNewerSchema", err)
		}
		if _, err := OpenReader(dir); !errors.Is(err, ErrNewerSchema) {
			t.Errorf("reader: got %v, want ErrNewerSchema", err)
		}
	})
	t.Run("another program's database", func(t *testing.T) {
		dir := t.TempDir()
		if _, err := rawDB(t, dir).Exec("CREATE TABLE x(y)"); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNotLedger) {
			t.Errorf("got %v, want ErrNotLedger", err)
		}
	})
	t.Run("not a database", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(strings.Repeat("garbage ", 1000)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{Dir: dir})
		if !errors.Is(err, ErrNotLedger) || !strings.Contains(err.Error(), filepath.Join(dir, fileName)) {
			t.Errorf("got %v, want ErrNotLedger naming the file", err)
		}
	})
	t.Run("damaged pages", func(t *testing.T) {
		dir := t.TempDir()
		l := open(t, dir)
		appendOK(t, l, "n1", gatewaytest.NewNode("n1", 1).Batch(200))
		l.Close()
		path := filepath.Join(dir, fileName)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i := 4096; i < len(data); i++ {
			data[i] = 0xff
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v, want ErrCorrupt", err)
		}
	})
	t.Run("records cut off", func(t *testing.T) {
		dir := t.TempDir()
		l := open(t, dir)
		appendOK(t, l, "n1", gatewaytest.NewNode("n1", 1).Batch(20))
		l.Close()
		ledgertest.Tamper(t, dir, "DROP TRIGGER records_no_delete", "DELETE FROM records WHERE node_seq = 20")
		if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v, want ErrCorrupt", err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if _, err := Open(Config{Dir: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want ErrNotExist", err)
		}
	})
}

func TestVerifyFindsTheFirstBreak(t *testing.T) {
	tests := map[string]struct {
		trigger, stmt string
		seq           uint64
		want          string
	}{
		"edited":     {"records_no_update", "UPDATE records SET delta = delta + 1 WHERE node_seq IN (7, 12)", 7, "content"},
		"rehashed":   {"records_no_update", "UPDATE records SET hash = zeroblob(32) WHERE node_seq = 7", 7, "content"},
		"moved":      {"tenants_frozen", "UPDATE tenants SET path = 'evil' WHERE path = 'acme'", 1, "content"},
		"deleted":    {"records_no_delete", "DELETE FROM records WHERE node_seq = 7", 7, "node_seq 8 follows 6"},
		"all gone":   {"records_no_delete", "DELETE FROM records WHERE node_seq > 7 AND node_seq < 20", 8, "follows 7"},
		"head moved": {"nodes_forward", "UPDATE nodes SET head = zeroblob(32)", 20, "not the head"},
		"rolled back": {"nodes_forward", "UPDATE nodes SET watermark = 10, head = (SELECT hash FROM records WHERE node_seq = 10)",
			20, "past the watermark 10"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			n := gatewaytest.NewNode("n1", 1)
			n.Add(&usagev1.Record{})
			n.Batch(19)
			appendOK(t, l, "n1", n.Sent)
			l.Close()
			ledgertest.Tamper(t, dir, "DROP TRIGGER "+tt.trigger, tt.stmt)
			r, err := OpenReader(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			_, err = r.Verify(t.Context(), "n1")
			var broken *BreakError
			if !errors.As(err, &broken) || broken.NodeSeq != tt.seq || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want a break at %d: %s", err, tt.seq, tt.want)
			}
		})
	}
	l := open(t, t.TempDir())
	if _, err := l.Verify(t.Context(), "nobody"); !errors.Is(err, ErrNoNode) {
		t.Errorf("got %v, want ErrNoNode", err)
	}
}

// A database error that is neither a refusal nor a full disk ends the ledger.
func TestFailStop(t *testing.T) {
	boom := errors.New("disk on fire")
	for _, point := range []string{"begin", "commit", "committed"} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			var armed bool
			l, err := Open(Config{Dir: dir, Fault: func(p string) error {
				if armed && p == point {
					return boom
				}
				return nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			n := gatewaytest.NewNode("n1", 1)
			appendOK(t, l, "n1", n.Batch(2))
			if l.Err() != nil {
				t.Errorf("got %v before the fault, want nil", l.Err())
			}
			armed = true
			if _, err := l.Append(t.Context(), "n1", n.Batch(2)); !errors.Is(err, boom) || !errors.Is(err, ErrFailed) {
				t.Errorf("got %v, want %v", err, boom)
			}
			select {
			case <-l.Failed():
			default:
				t.Error("Failed is open, want closed")
			}
			armed = false
			if _, err := l.Append(t.Context(), "n1", n.Sent[2:]); !errors.Is(err, ErrFailed) {
				t.Errorf("got %v, want ErrFailed", err)
			}
			if !errors.Is(l.Err(), boom) {
				t.Errorf("got %v, want %v", l.Err(), boom)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			l = open(t, dir)
			if got := appendOK(t, l, "n1", n.Sent); got.Seq != 4 {
				t.Errorf("got watermark %d, want 4", got.Seq)
			}
		})
	}
}

func TestCancelledBeforeTheQueue(t *testing.T) {
	l := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Append(ctx, "n1", gatewaytest.NewNode("n1", 1).Batch(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
}
