// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

var bigInts = cmp.Comparer(func(a, b *big.Int) bool { return a.Cmp(b) == 0 })

// wantSums compares the gateway's ledger with what the nodes sent.
func wantSums(t testing.TB, c client, sent ...[]*usagev1.Record) {
	t.Helper()
	want := gatewaytest.Sum(true, everything, sent...)
	got := c.totals(t, &gatewayv1.QueryUsageRequest{BySandbox: true})
	if diff := cmp.Diff(want, got, bigInts); diff != "" {
		t.Errorf("sums (-want +got):\n%s", diff)
	}
}

// The gateway is killed at each point of a commit. Whether the batch was kept is
// fixed for each; that nothing was acknowledged, and that sending it again
// counts it once, is the same for all.
func TestKilledInCommit(t *testing.T) {
	tests := map[string]struct{ kept uint64 }{
		"begin":     {20}, // before the commit: absent
		"commit":    {20}, // written, not committed: absent
		"committed": {30}, // committed, the acknowledgement is lost: whole
	}
	for point, tt := range tests {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			killed := startChild(t, dir, point+" 3")
			c := dial(t, testConfig(dir).Listen[0].Addr)
			n := gatewaytest.NewNode("n1", 1)
			n.Batch(50)
			batches := slices.Collect(slices.Chunk(n.Sent, 10))
			acked, err := c.push(t.Context(), "n1", batches...)
			wantCode(t, err, codes.Unavailable, "")
			if acked != 20 {
				t.Errorf("got acknowledgement of %d, want 20", acked)
			}
			killed.Wait()

			startChild(t, dir, "")
			if got := c.watermark(t, "n1"); got != tt.kept {
				t.Errorf("got watermark %d, want %d", got, tt.kept)
			}
			// The node goes on from what was acknowledged, not from the watermark.
			if acked, err := c.push(t.Context(), "n1", batches[2:]...); err != nil || acked != 50 {
				t.Errorf("resend: got %d, %v, want 50", acked, err)
			}
			wantSums(t, c, n.Sent)
		})
	}
}

// Twenty nodes push while the gateway is killed again and again. Each node does
// what a node does: on an error it goes on behind its last acknowledgement.
func TestKilledAtRandom(t *testing.T) {
	dir := t.TempDir()
	sock := testConfig(dir).Listen[0].Addr
	nodes := make([]*gatewaytest.Node, 20)
	sent := make([][]*usagev1.Record, len(nodes))
	for i := range nodes {
		nodes[i] = gatewaytest.NewNode(fmt.Sprintf("node-%d", i), uint64(i))
		sent[i] = nodes[i].Batch(1000)
	}
	cmd := startChild(t, dir, "")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i, n := range nodes {
		c := dial(t, sock)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			for acked := uint64(0); acked < uint64(len(n.Sent)); {
				got, err := c.push(ctx, n.ID, slices.Collect(slices.Chunk(n.Sent[acked:], 1+rng.IntN(80)))...)
				acked = max(acked, got)
				if err == nil {
					continue
				}
				if ctx.Err() != nil || status.Code(err) != codes.Unavailable {
					t.Errorf("%s at %d: %v", n.ID, acked, err)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	kills := 0
	rng := rand.New(rand.NewPCG(1, 2))
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(time.Duration(20+rng.IntN(100)) * time.Millisecond):
			if kills < 10 {
				cmd.Process.Kill()
				cmd.Wait()
				cmd = startChild(t, dir, "")
				kills++
			}
		}
	}
	t.Logf("killed %d times", kills)
	c := dial(t, sock)
	for _, n := range nodes {
		if got := c.watermark(t, n.ID); got != uint64(len(n.Sent)) {
			t.Errorf("%s: got watermark %d, want %d", n.ID, got, len(n.Sent))
		}
	}
	wantSums(t, c, sent...)
	cmd.Process.Kill()
	cmd.Wait()
	var report lines
	if err := Verify(t.Context(), testConfig(dir), "", &report); err != nil || len(report) != len(nodes) {
		t.Errorf("verify: got %q, %v", report, err)
	}
}

// lines collects what is written, one write a line.
type lines []string

func (l *lines) Write(p []byte) (int, error) {
	*l = append(*l, string(p))
	return len(p), nil
}

func TestWrongBatches(t *testing.T) {
	cfg := testConfig(t.TempDir())
	start(t, cfg)
	c := dial(t, cfg.Listen[0].Addr)
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(30)
	if acked, err := c.push(t.Context(), "n1", n.Sent[:10]); err != nil || acked != 10 {
		t.Fatalf("got %d, %v, want 10", acked, err)
	}

	// Duplicate: acknowledged again.
	if acked, err := c.push(t.Context(), "n1", n.Sent[:10], n.Sent[3:5]); err != nil || acked != 10 {
		t.Errorf("duplicate: got %d, %v, want 10", acked, err)
	}

	// Reordered: refused, and the detail says where to go on.
	_, err := c.push(t.Context(), "n1", n.Sent[20:])
	wantCode(t, err, codes.OutOfRange, "begins at node_seq 21, want 11")
	details := status.Convert(err).Details()
	want := &usagev1.WatermarkResponse{NodeSeq: 10, Hash: n.Sent[9].Hash}
	if len(details) != 1 || !proto.Equal(details[0].(proto.Message), want) {
		t.Errorf("got details %v, want %v", details, want)
	}

	// Same id, different payload.
	other := proto.Clone(n.Sent[4]).(*usagev1.Record)
	other.WorkloadRef = "other"
	other.Hash = usagev1.Hash(other.PrevHash, other)
	_, err = c.push(t.Context(), "n1", []*usagev1.Record{other})
	wantCode(t, err, codes.FailedPrecondition, other.Id)

	// Malformed: named.
	bad := proto.Clone(n.Sent[10]).(*usagev1.Record)
	bad.Meter = "CPU"
	_, err = c.push(t.Context(), "n1", []*usagev1.Record{bad})
	wantCode(t, err, codes.InvalidArgument, bad.Id)
	_, err = c.push(t.Context(), "n1", nil)
	wantCode(t, err, codes.InvalidArgument, "0 records")
	_, err = c.push(t.Context(), "", n.Sent[10:])
	wantCode(t, err, codes.InvalidArgument, "node_id")
	_, err = c.push(t.Context(), "n2", n.Sent[:10])
	wantCode(t, err, codes.InvalidArgument, "not of node n2")
	_, err = c.usage.Watermark(t.Context(), &usagev1.WatermarkRequest{})
	wantCode(t, err, codes.InvalidArgument, "node_id")

	// A stream is for one node.
	stream, err := c.usage.Push(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&usagev1.PushRequest{NodeId: "n1", Records: n.Sent[:10]})
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	stream.Send(&usagev1.PushRequest{NodeId: "n2", Records: gatewaytest.NewNode("n2", 1).Batch(1)})
	_, err = stream.Recv()
	wantCode(t, err, codes.InvalidArgument, "a stream is for one node")

	// Too large for one message; the gateway lives on.
	huge := proto.Clone(n.Sent[10]).(*usagev1.Record)
	huge.WorkloadRef = string(make([]byte, 5<<20))
	_, err = c.push(t.Context(), "n1", []*usagev1.Record{huge})
	wantCode(t, err, codes.ResourceExhausted, "larger than max")

	if acked, err := c.push(t.Context(), "n1", n.Sent[10:20], n.Sent[20:]); err != nil || acked != 30 {
		t.Errorf("got %d, %v, want 30", acked, err)
	}
	wantSums(t, c, n.Sent)
}

// The largest batch that the ledger takes fits in one message.
func TestLargestBatch(t *testing.T) {
	cfg := testConfig(t.TempDir())
	start(t, cfg)
	long := func(n int) string { return string(slices.Repeat([]byte("x"), n)) }
	n := gatewaytest.NewNode("n1", 1)
	for range 1000 {
		n.Add(&usagev1.Record{Tenant: long(usagev1.MaxTenant), SandboxName: long(usagev1.MaxSandboxName),
			WorkloadRef: long(usagev1.MaxWorkloadRef), Resource: &usagev1.Resource{GpuUuid: long(usagev1.MaxResourceText),
				MigUuid: long(usagev1.MaxResourceText), Profile: long(usagev1.MaxResourceText), FractionNum: 1, FractionDen: 1}})
	}
	c := dial(t, cfg.Listen[0].Addr)
	if acked, err := c.push(t.Context(), "n1", n.Sent); err != nil || acked != 1000 {
		t.Errorf("got %d, %v, want 1000", acked, err)
	}
}

// BenchmarkPush is the whole way: socket, checks, commit, acknowledgement.
func BenchmarkPush(b *testing.B) {
	for _, size := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			cfg := testConfig(b.TempDir())
			start(b, cfg)
			stream, err := dial(b, cfg.Listen[0].Addr).usage.Push(b.Context(), grpc.WaitForReady(true))
			if err != nil {
				b.Fatal(err)
			}
			n := gatewaytest.NewNode("node", 1)
			n.Batch(b.N * size)
			b.ResetTimer()
			for batch := range slices.Chunk(n.Sent, size) {
				if err := stream.Send(&usagev1.PushRequest{NodeId: "node", Records: batch}); err != nil {
					b.Fatal(err)
				}
				if _, err := stream.Recv(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}
