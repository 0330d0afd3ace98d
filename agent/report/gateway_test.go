// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/agent/spool"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const node = "node-a"

// gateway is a ledger of one node in memory, served over real gRPC. Like the
// real one it commits, then answers; takes a record once; and refuses what does
// not continue the chain.
type gateway struct {
	usagev1.UnimplementedUsageServer
	t testing.TB

	mu      sync.Mutex
	recs    []*usagev1.Record
	batches []int // size of each batch that arrived
	marks   int   // Watermark calls
	again   int   // records that arrived although they were there

	// Faults; called without mu.
	beforeCommit func(batch int) error // not nil: nothing is committed
	beforeAnswer func(batch int) error // not nil: committed, not answered
	watermark    func(real *usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error)
}

func (g *gateway) last() (uint64, []byte) {
	if len(g.recs) == 0 {
		return 0, usagev1.ZeroHash()
	}
	r := g.recs[len(g.recs)-1]
	return r.NodeSeq, r.Hash
}

func (g *gateway) Watermark(_ context.Context, req *usagev1.WatermarkRequest) (*usagev1.WatermarkResponse, error) {
	if req.GetNodeId() != node {
		g.t.Errorf("node id %q", req.GetNodeId())
	}
	g.mu.Lock()
	g.marks++
	seq, hash := g.last()
	fault := g.watermark
	g.mu.Unlock()
	resp := &usagev1.WatermarkResponse{NodeSeq: seq, Hash: hash}
	if fault != nil {
		return fault(resp)
	}
	return resp, nil
}

func (g *gateway) Push(stream grpc.BidiStreamingServer[usagev1.PushRequest, usagev1.PushResponse]) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		g.mu.Lock()
		g.batches = append(g.batches, len(req.GetRecords()))
		n := len(g.batches)
		before, after := g.beforeCommit, g.beforeAnswer
		g.mu.Unlock()
		if before != nil {
			if err := before(n); err != nil {
				return err
			}
		}
		if err := g.commit(req.GetRecords()); err != nil {
			return err
		}
		if after != nil {
			if err := after(n); err != nil {
				return err
			}
		}
		g.mu.Lock()
		seq, _ := g.last()
		g.mu.Unlock()
		if err := stream.Send(&usagev1.PushResponse{NodeSeq: seq}); err != nil {
			return err
		}
	}
}

func (g *gateway) commit(recs []*usagev1.Record) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range recs {
		if err := usagev1.Validate(r); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		seq, hash := g.last()
		if r.NodeSeq > seq+1 {
			return status.Errorf(codes.OutOfRange, "send from %d", seq+1)
		}
		if r.NodeSeq <= seq {
			g.again++
			if !bytes.Equal(g.recs[r.NodeSeq-1].Hash, r.Hash) {
				return status.Errorf(codes.FailedPrecondition, "record %d has another content", r.NodeSeq)
			}
			continue
		}
		if err := usagev1.VerifyChain(seq, hash, r); err != nil {
			return status.Error(codes.FailedPrecondition, err.Error())
		}
		g.recs = append(g.recs, proto.CloneOf(r))
	}
	return nil
}

func (g *gateway) set(fn func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fn()
}

func (g *gateway) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.recs)
}

// site is a node with a spool and a reporter, and a gateway.
type site struct {
	t      testing.TB
	gw     *gateway
	socket string
	server *grpc.Server
	cfg    spool.Config
	spool  *spool.Spool
	rep    *Reporter
	stop   context.CancelFunc
	ended  chan error
	made   uint64
}

func newSite(t testing.TB) *site {
	t.Helper()
	// Socket paths are short.
	dir, err := os.MkdirTemp("", "report")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &site{t: t, gw: &gateway{t: t}, socket: filepath.Join(dir, "s")}
	s.cfg = spool.Config{Dir: filepath.Join(dir, "spool"), NodeID: node, LimitBytes: 1 << 20, SegmentBytes: 4096}
	s.openSpool()
	s.serve()
	t.Cleanup(func() {
		s.leave()
		s.server.Stop()
		s.spool.Close()
	})
	return s
}

func (s *site) openSpool() {
	s.t.Helper()
	var err error
	if s.spool, err = spool.Open(s.cfg); err != nil {
		s.t.Fatal(err)
	}
}

// serve starts the gateway's process.
func (s *site) serve() {
	s.t.Helper()
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = serve(l, s.gw, nil)
}

func serve(l net.Listener, gw *gateway, creds credentials.TransportCredentials) *grpc.Server {
	var opts []grpc.ServerOption
	if creds != nil {
		opts = append(opts, grpc.Creds(creds))
	}
	srv := grpc.NewServer(opts...)
	usagev1.RegisterUsageServer(srv, gw)
	go srv.Serve(l)
	return srv
}

var quick = pace{
	firstRetry: time.Millisecond, lastRetry: 20 * time.Millisecond, conflict: 20 * time.Millisecond,
	answer: 10 * time.Second, heartbeat: time.Hour, batchCount: 10, batchBytes: 1 << 20, logInterval: time.Hour,
}

// start runs a reporter.
func (s *site) start(p pace) {
	s.t.Helper()
	var err error
	if s.rep, err = New(Config{Target: "unix://" + s.socket, NodeID: node}, s.spool); err != nil {
		s.t.Fatal(err)
	}
	s.rep.pace = p
	s.run()
}

func (s *site) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	s.stop, s.ended = cancel, ended
	go func() { ended <- s.rep.Run(ctx) }()
}

// leave ends the reporter.
func (s *site) leave() {
	s.t.Helper()
	if s.stop == nil {
		return
	}
	s.stop()
	s.stop = nil
	select {
	case err := <-s.ended:
		if err != nil {
			s.t.Errorf("run ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		s.t.Fatal("run does not end")
	}
}

// make spools n more records.
func (s *site) make(n int) {
	s.t.Helper()
	var recs []*usagev1.Record
	for range n {
		s.made++
		recs = append(recs, record(s.made, 0))
		if len(recs) == 8 || uint64(len(recs)) == uint64(n) {
			s.append(recs)
			recs = nil
		}
	}
	if len(recs) > 0 {
		s.append(recs)
	}
}

func (s *site) append(recs []*usagev1.Record) {
	s.t.Helper()
	if err := s.spool.Append(context.Background(), recs); err != nil {
		s.t.Fatal(err)
	}
}

func record(seq uint64, note int) *usagev1.Record {
	return &usagev1.Record{
		Source: usagev1.Source(node, "boot-1"),
		Id:     usagev1.ID{Sandbox: "abcdefghijkl", Meter: usagev1.MeterCPU, Generation: 1, Seq: seq}.String(),
		Tenant: "acme", Sandbox: "abcdefghijkl", Meter: usagev1.MeterCPU,
		StartNs: int64(seq), EndNs: int64(seq + 1), MonoNs: 1, Delta: 1, Cumulative: seq,
		Quality: usagev1.Quality_QUALITY_MEASURED, WorkloadRef: string(bytes.Repeat([]byte{'x'}, note)),
	}
}

// until waits for something to become true.
func (s *site) until(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("waited too long for: %s; reporter %+v, spool %+v, ledger %d", what, s.rep.Status(), s.spool.Status(), s.gw.count())
		}
	}
}

// shipped waits until everything is acknowledged and checks that the ledger
// holds every record made exactly once, in order.
func (s *site) shipped() {
	s.t.Helper()
	s.until("everything is acknowledged", func() bool { return s.spool.Status().Acked == s.made })
	s.exactlyOnce()
	s.until("connected, and no error", func() bool {
		got := s.rep.Status()
		return got.State == Connected && got.LastError == "" && got.Watermark == s.made
	})
}

func (s *site) exactlyOnce() {
	s.t.Helper()
	s.gw.mu.Lock()
	defer s.gw.mu.Unlock()
	if got := uint64(len(s.gw.recs)); got != s.made {
		s.t.Fatalf("the ledger has %d records, want %d", got, s.made)
	}
	prev := usagev1.ZeroHash()
	for i, r := range s.gw.recs {
		if err := usagev1.VerifyChain(uint64(i), prev, r); err != nil {
			s.t.Fatal(err)
		}
		if want := record(uint64(i+1), 0).Id; r.Id != want {
			s.t.Fatalf("record %d is %s, want %s", i+1, r.Id, want)
		}
		prev = r.Hash
	}
}
