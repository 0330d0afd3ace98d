// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// matches is Filter's meaning, written without SQL.
func matches(f Filter) func(*usagev1.Record) bool {
	return func(r *usagev1.Record) bool {
		return (f.Tenant == "" || gatewaytest.Below(f.Tenant, r.Tenant)) &&
			(f.Sandbox == "" || f.Sandbox == r.Sandbox) &&
			(f.Meter == "" || f.Meter == r.Meter) &&
			(f.StartNs == 0 || r.StartNs >= f.StartNs) && (f.EndNs == 0 || r.StartNs < f.EndNs)
	}
}

// Whatever is asked, sums and lists are those of the records that were sent.
func TestQueriesAgreeWithTheModel(t *testing.T) {
	l := open(t, t.TempDir())
	var sent [][]*usagev1.Record
	var all []*usagev1.Record // in ledger order
	nodes := []*gatewaytest.Node{gatewaytest.NewNode("a", 1), gatewaytest.NewNode("bb", 2), gatewaytest.NewNode("ccc", 3)}
	for range 10 {
		for _, n := range nodes {
			batch := n.Batch(80)
			if len(n.Sent) > 80 { // correct something old
				old := n.Sent[len(n.Sent)/3]
				n.Add(&usagev1.Record{Corrects: old.Id, Tenant: "acme/vision", Sandbox: old.Sandbox, Meter: old.Meter, Delta: 5})
				batch = n.Sent[len(n.Sent)-81:]
			}
			appendOK(t, l, n.ID, batch)
			all = append(all, batch...)
		}
	}
	for _, n := range nodes {
		sent = append(sent, n.Sent)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(values ...string) string { return values[rng.IntN(len(values))] }
	filters := []Filter{{}, {Tenant: "acme"}, {Tenant: "acme/vision"}, {Tenant: "acm"}, {Tenant: "acme/"}, {Tenant: "a%"}}
	for range 60 {
		f := Filter{
			Tenant:  pick("", "acme", "acme/vision", "acme/vision/train", "acmeX", "acme-eu", "none"),
			Sandbox: pick("", "", all[rng.IntN(len(all))].Sandbox, "bbbbbbbb"),
			Meter:   pick("", usagev1.MeterCPU, usagev1.MeterWall, "none"),
		}
		if rng.IntN(2) == 0 {
			f.StartNs = rng.Int64N(810) * 1e9
		}
		if rng.IntN(2) == 0 {
			f.EndNs = f.StartNs + rng.Int64N(400)*1e9
		}
		filters = append(filters, f)
	}
	for _, f := range filters {
		for _, bySandbox := range []bool{false, true} {
			want := gatewaytest.Sum(bySandbox, matches(f), sent...)
			if diff := cmp.Diff(want, totals(t, l.Reader, f, bySandbox), bigInts); diff != "" {
				t.Errorf("%+v by sandbox %v (-want +got):\n%s", f, bySandbox, diff)
			}
		}
		var want []*usagev1.Record
		for _, r := range all {
			if matches(f)(r) {
				want = append(want, r)
			}
		}
		if diff := cmp.Diff(want, records(t, l.Reader, f), protocmp.Transform()); diff != "" {
			t.Errorf("records of %+v (-want +got):\n%s", f, diff)
		}
	}
}

func TestUsageRow(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	n.Add(&usagev1.Record{Delta: 1 << 63, SandboxName: "job", StartNs: 50, EndNs: 60})
	n.Add(&usagev1.Record{Delta: 1<<64 - 1, SandboxName: "job", StartNs: 10, EndNs: 90})
	n.Add(&usagev1.Record{Quality: usagev1.Quality_QUALITY_GAP, SandboxName: "job", StartNs: 20, EndNs: 30})
	appendOK(t, l, "n1", n.Sent)
	got, err := l.Usage(t.Context(), Filter{}, true)
	if err != nil {
		t.Fatal(err)
	}
	sum, _ := new(big.Int).SetString("27670116110564327423", 10) // 2^63 + 2^64 - 1
	want := []Row{{Tenant: "acme", Sandbox: "aaaaaaaaaaaa", SandboxName: "job", Meter: "cpu_ns",
		Total: sum, Records: 3, GapRecords: 1, StartNs: 10, EndNs: 90}}
	if diff := cmp.Diff(want, got, bigInts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCorrections(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	wrong := n.Add(&usagev1.Record{Tenant: "acme", Delta: 100})
	n.Add(&usagev1.Record{Tenant: "acme", Delta: 1})
	// Split over two tenants, then one part is corrected again.
	n.Add(&usagev1.Record{Tenant: "acme", Delta: 30, Corrects: wrong.Id})
	part := n.Add(&usagev1.Record{Tenant: "zeta", Delta: 60, Corrects: wrong.Id})
	n.Add(&usagev1.Record{Tenant: "zeta", Delta: 70, Corrects: part.Id})
	appendOK(t, l, "n1", n.Sent)
	// Another node has a record with the same id; it is not the one that was corrected.
	other := gatewaytest.NewNode("n2", 1)
	other.Add(&usagev1.Record{Tenant: "acme", Delta: 1000})
	appendOK(t, l, "n2", other.Sent)
	want := map[gatewaytest.Key]*big.Int{
		{Tenant: "acme", Meter: "cpu_ns"}: big.NewInt(1031),
		{Tenant: "zeta", Meter: "cpu_ns"}: big.NewInt(70),
	}
	if diff := cmp.Diff(want, totals(t, l.Reader, Filter{}, false), bigInts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := len(records(t, l.Reader, Filter{})); got != 6 {
		t.Errorf("got %d records listed, want all 6", got)
	}
}

func TestUsageRefusesTooManyRows(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	for i := range MaxRows + 1 {
		sandbox := []byte("aaaaaaaaaaaa")
		for j := range 4 {
			sandbox[j] = "abcdefghijklmnop"[i>>(4*j)&15]
		}
		n.Add(&usagev1.Record{Sandbox: string(sandbox)})
	}
	for at := 0; at < len(n.Sent); at += MaxRecords {
		appendOK(t, l, "n1", n.Sent[at:min(at+MaxRecords, len(n.Sent))])
	}
	if _, err := l.Usage(t.Context(), Filter{}, true); !errors.Is(err, ErrTooMany) {
		t.Errorf("got %v, want ErrTooMany", err)
	}
	if rows, err := l.Usage(t.Context(), Filter{}, false); err != nil || len(rows) != 1 {
		t.Errorf("got %d rows, %v, want 1", len(rows), err)
	}
}

// Records that arrive while a list is read are left out; a caller that stops is obeyed.
func TestRecordsIsASnapshot(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	for range 3 {
		appendOK(t, l, "n1", n.Batch(1000))
	}
	for _, f := range []Filter{{}, {EndNs: 1 << 62}} {
		before := len(n.Sent)
		var got int
		if err := l.Records(t.Context(), f, func(*usagev1.Record) error {
			if got++; got == 1 {
				appendOK(t, l, "n1", n.Batch(10))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if got != before {
			t.Errorf("got %d records, want %d", got, before)
		}
		stop := errors.New("stop")
		if err := l.Records(t.Context(), f, func(*usagev1.Record) error { return stop }); err != stop {
			t.Errorf("got %v, want %v", err, stop)
		}
	}
}

func TestNodesAndWatermark(t *testing.T) {
	l := open(t, t.TempDir())
	n := gatewaytest.NewNode("n1", 1)
	appendOK(t, l, "n1", n.Batch(3))
	nodes, err := l.Nodes(t.Context())
	if err != nil || len(nodes) != 1 || nodes[0].ID != "n1" || nodes[0].LastPush.IsZero() {
		t.Errorf("got %+v, %v, want n1", nodes, err)
	}
	for node, want := range map[string]Mark{"n1": {3, n.Head()}, "n2": {0, usagev1.ZeroHash()}} {
		got, err := l.Watermark(t.Context(), node)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", node, diff)
		}
	}
}

// TestConservation sends batches in every wrong way that a node, a network and a
// crash can produce, reopens the ledger at random, and compares it with a model
// that holds, for each node, only how many of its true records have arrived.
func TestConservation(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { conserve(t, seed) })
	}
}

func conserve(t *testing.T, seed uint64) {
	dir := t.TempDir()
	l := open(t, dir)
	rng := rand.New(rand.NewPCG(seed, 7))
	nodes := make([]*gatewaytest.Node, 4)
	arrived := make([]int, len(nodes)) // the model
	for i := range nodes {
		nodes[i] = gatewaytest.NewNode(fmt.Sprintf("node-%d", i), seed)
	}
	for range 300 {
		i := rng.IntN(len(nodes))
		n := nodes[i]
		if rng.IntN(3) > 0 {
			n.Batch(1 + rng.IntN(20))
		}
		if len(n.Sent) == 0 {
			continue
		}
		from := rng.IntN(len(n.Sent))
		if rng.IntN(2) == 0 {
			from = min(arrived[i], len(n.Sent)-1) // as a node does
		}
		to := from + 1 + rng.IntN(len(n.Sent)-from)
		batch := n.Sent[from:to]
		wantErr := error(nil)
		if from > arrived[i] {
			wantErr = ErrGap
		}
		switch rng.IntN(8) {
		case 0: // bit rot: refused as such, gap or not
			batch = append([]*usagev1.Record(nil), batch...)
			k := rng.IntN(len(batch))
			batch[k] = proto.Clone(batch[k]).(*usagev1.Record)
			batch[k].PolicyRev++
			wantErr = ErrConflict
		case 1: // a batch that is not in order
			if len(batch) > 1 {
				batch = []*usagev1.Record{batch[1], batch[0]}
				wantErr = ErrInvalid
			}
		case 2:
			l.Close()
			l = open(t, dir)
		}
		_, err := l.Append(t.Context(), n.ID, batch)
		if !errors.Is(err, wantErr) {
			t.Fatalf("batch [%d,%d) of %s with %d arrived: got %v, want %v", from, to, n.ID, arrived[i], err, wantErr)
		}
		if wantErr == nil {
			arrived[i] = max(arrived[i], to)
		}
	}
	var sent [][]*usagev1.Record
	for i, n := range nodes {
		sent = append(sent, n.Sent[:arrived[i]])
		if got, err := l.Watermark(t.Context(), n.ID); err != nil || got.Seq != uint64(arrived[i]) {
			t.Errorf("%s: got watermark %d, %v, want %d", n.ID, got.Seq, err, arrived[i])
		}
		if arrived[i] == 0 {
			continue
		}
		if got, err := l.Verify(t.Context(), n.ID); err != nil || got != uint64(arrived[i]) {
			t.Errorf("%s: verify: got %d, %v, want %d", n.ID, got, err, arrived[i])
		}
	}
	want := gatewaytest.Sum(true, matches(Filter{}), sent...)
	if diff := cmp.Diff(want, totals(t, l.Reader, Filter{}, true), bigInts); diff != "" {
		t.Errorf("sums (-want +got):\n%s", diff)
	}
}
