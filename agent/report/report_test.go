// SPDX-License-Identifier: Apache-2.0

package report

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/spool"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

func TestShips(t *testing.T) {
	s := newSite(t)
	s.make(95)
	s.start(quick)
	s.shipped()
	if got := s.spool.Status().First; got < 50 {
		t.Errorf("first record kept is %d: acknowledged segments were not removed", got)
	}
	s.gw.set(func() {
		if len(s.gw.batches) != 10 || s.gw.again != 0 || s.gw.marks != 1 {
			t.Errorf("%v batches, %d records again, %d watermarks", s.gw.batches, s.gw.again, s.gw.marks)
		}
	})
	// What comes later goes at once, on the same stream.
	for range 5 {
		s.make(3)
		s.shipped()
	}
	s.gw.set(func() {
		if s.gw.marks != 1 {
			t.Errorf("%d watermarks, want 1: the session did not last", s.gw.marks)
		}
	})
}

func TestBatchesAreBoundedInBytes(t *testing.T) {
	s := newSite(t)
	for range 20 {
		s.made++
		s.append([]*usagev1.Record{record(s.made, 1000)})
	}
	p := quick
	p.batchBytes = 5000
	s.start(p)
	s.shipped()
	s.gw.set(func() {
		for _, n := range s.gw.batches {
			if n > 4 {
				t.Errorf("a batch of %d records is beyond the bound", n)
			}
		}
	})
	// A record that alone is beyond the bound goes alone.
	s.leave()
	p.batchBytes = 10
	s.made++
	s.append([]*usagev1.Record{record(s.made, 1000)})
	s.start(p)
	s.shipped()
}

// The gateway commits and dies before it answers: sent again, counted once.
func TestLostAcknowledgement(t *testing.T) {
	s := newSite(t)
	s.gw.beforeAnswer = func(batch int) error {
		if batch == 3 || batch == 5 {
			return status.Error(codes.Unavailable, "the test hangs up")
		}
		return nil
	}
	s.make(95)
	s.start(quick)
	s.shipped()
}

// The gateway dies before it commits.
func TestLostBatch(t *testing.T) {
	s := newSite(t)
	s.gw.beforeCommit = func(batch int) error {
		if batch < 4 {
			return status.Error(codes.Internal, "the test hangs up")
		}
		return nil
	}
	s.make(95)
	s.start(quick)
	s.shipped()
}

// The gateway's watermark is behind what it has: everything arrives twice and
// is counted once.
func TestDuplicates(t *testing.T) {
	s := newSite(t)
	s.make(40)
	s.start(quick)
	s.shipped()
	s.leave()
	s.make(10)
	first := s.spool.Status().First
	s.gw.watermark = func(real *usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error) {
		hash, err := s.spool.HashAt(first - 1)
		return &usagev1.WatermarkResponse{NodeSeq: first - 1, Hash: hash}, err
	}
	s.start(quick)
	s.until("everything is acknowledged", func() bool { return s.spool.Status().Acked == s.made })
	s.exactlyOnce()
	s.gw.set(func() {
		if s.gw.again == 0 {
			t.Error("nothing arrived twice: the test did not test anything")
		}
	})
}

// A batch that a session gave up waiting for is committed after the next
// session has asked for the watermark.
func TestLateCommit(t *testing.T) {
	s := newSite(t)
	s.make(25)
	release := make(chan struct{})
	s.gw.beforeCommit = func(batch int) error {
		if batch == 1 {
			<-release
		}
		return nil
	}
	var asked atomic.Int32
	s.gw.watermark = func(real *usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error) {
		if asked.Add(1) == 2 {
			close(release)
			for s.gw.count() < 10 {
				time.Sleep(time.Millisecond)
			}
		}
		return real, nil
	}
	p := quick
	p.answer = 100 * time.Millisecond
	s.start(p)
	s.shipped()
}

// The gateway does not answer: given up and tried again.
func TestHangingGateway(t *testing.T) {
	s := newSite(t)
	s.make(25)
	hung := make(chan struct{})
	s.gw.beforeCommit = func(batch int) error {
		if batch == 2 {
			<-hung
			return errors.New("too late")
		}
		return nil
	}
	p := quick
	p.answer = 50 * time.Millisecond
	s.start(p)
	s.shipped()
	close(hung)
}

func TestGatewayRestart(t *testing.T) {
	s := newSite(t)
	s.make(20)
	s.start(quick)
	s.shipped()
	s.server.Stop()
	s.until("disconnected", func() bool { return s.rep.Status().State == Disconnected })
	if got := s.rep.Status(); got.LastError == "" || got.Since.IsZero() {
		t.Errorf("got %+v, want an error", got)
	}
	s.make(30)
	time.Sleep(10 * time.Millisecond)
	if got := s.spool.Status(); got.Acked != 20 {
		t.Errorf("acknowledged up to %d without a gateway", got.Acked)
	}
	s.serve()
	s.shipped()
}

// The reporter's process dies at any moment, with the spool; the gateway too.
func TestChaos(t *testing.T) {
	s := newSite(t)
	rng := rand.New(rand.NewPCG(5, 6))
	maybe := func(int) error {
		switch rand.IntN(6) {
		case 0:
			return status.Error(codes.Unavailable, "chaos")
		case 1:
			return status.Error(codes.OutOfRange, "chaos")
		}
		return nil
	}
	s.gw.beforeCommit, s.gw.beforeAnswer = maybe, maybe
	for range 25 {
		s.make(rng.IntN(30))
		s.start(quick)
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		if rng.IntN(3) == 0 {
			s.server.Stop()
			s.serve()
		}
		s.make(rng.IntN(10))
		s.leave()
		if err := s.spool.Close(); err != nil {
			t.Fatal(err)
		}
		s.openSpool()
	}
	s.gw.set(func() { s.gw.beforeCommit, s.gw.beforeAnswer = nil, nil })
	s.start(quick)
	s.shipped()
	t.Logf("%d records, %d of them arrived again", s.made, s.gw.again)
}

// The acknowledgement cannot be written: it is asked for again, and the records
// are not sent again.
func TestAckCannotBeWritten(t *testing.T) {
	s := newSite(t)
	s.spool.Close()
	var failing atomic.Int32
	failing.Store(3)
	s.cfg.Fault = func(op, _ string) error {
		if op == "ack:fsync" && failing.Add(-1) >= 0 {
			return errors.New("no space left, says the test")
		}
		return nil
	}
	s.openSpool()
	s.make(25)
	s.start(quick)
	s.shipped()
	if failing.Load() > 0 {
		t.Error("no acknowledgement failed")
	}
}

// The gateway lost what it had acknowledged, and the spool still has it.
func TestGatewayForgetsWhatIsKept(t *testing.T) {
	s := newSite(t)
	s.make(95)
	s.start(quick)
	s.shipped()
	s.leave()
	first := s.spool.Status().First
	if first == 96 {
		t.Fatal("nothing is kept")
	}
	s.gw.recs = s.gw.recs[:first-1]
	s.start(quick)
	s.until("the ledger is whole", func() bool { return s.gw.count() == 95 })
	s.make(5)
	s.shipped()
}

// The same while the session is idle: the heartbeat finds out.
func TestGatewayForgetsWhileIdle(t *testing.T) {
	s := newSite(t)
	s.make(95)
	p := quick
	p.heartbeat = 10 * time.Millisecond
	s.start(p)
	s.shipped()
	first := s.spool.Status().First
	s.gw.set(func() { s.gw.recs = s.gw.recs[:first-1] })
	s.until("the ledger is whole", func() bool { return s.gw.count() == 95 })
	s.make(5)
	s.shipped()
}

// conflictCase is a disagreement that only a person can end.
type conflictCase struct {
	damage func(s *site) (repair func())
	says   string
}

// In a conflict nothing is sent, nothing is dropped, the reason is told, and
// when somebody has put it right everything goes on.
func TestConflicts(t *testing.T) {
	refuse := func(code codes.Code) func(s *site) func() {
		return func(s *site) func() {
			s.gw.set(func() {
				s.gw.beforeCommit = func(int) error { return status.Error(code, "record 96 is not what it was") }
			})
			return func() { s.gw.set(func() { s.gw.beforeCommit = nil }) }
		}
	}
	watermark := func(seq uint64, hash []byte) func(s *site) func() {
		return func(s *site) func() {
			s.gw.set(func() {
				s.gw.watermark = func(*usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error) {
					return &usagev1.WatermarkResponse{NodeSeq: seq, Hash: hash}, nil
				}
			})
			return func() { s.gw.set(func() { s.gw.watermark = nil }) }
		}
	}
	for name, tc := range map[string]conflictCase{
		"gateway lost what is gone here": {func(s *site) func() {
			var kept []*usagev1.Record
			s.gw.set(func() { kept, s.gw.recs = s.gw.recs, s.gw.recs[:3] })
			return func() { s.gw.set(func() { s.gw.recs = kept }) }
		}, "has lost usage records 4 to "},
		"gateway lost everything": {func(s *site) func() {
			var kept []*usagev1.Record
			s.gw.set(func() { kept, s.gw.recs = s.gw.recs, nil })
			return func() { s.gw.set(func() { s.gw.recs = kept }) }
		}, "has lost usage records 1 to "},
		"gateway is ahead":             {watermark(1000, make([]byte, 32)), "records 101 to 1000 of node node-a, which this node never made"},
		"gateway has another record":   {watermark(95, make([]byte, 32)), "record 95 of node node-a is another"},
		"gateway has no hash":          {watermark(95, nil), "record 95 of node node-a is another"},
		"gateway finds other content":  {refuse(codes.FailedPrecondition), "the gateway has other records of this node: "},
		"gateway finds it malformed":   {refuse(codes.InvalidArgument), "the gateway refuses a record: "},
		"gateway acknowledges unknown": {func(s *site) func() { return s.gw.lie(1000) }, "acknowledges usage record 1000 "},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.make(95)
			s.start(quick)
			s.shipped()
			s.leave()
			repair := tc.damage(s)
			s.make(5)
			s.start(quick)
			s.until("conflict", func() bool { return s.rep.Status().State == Conflict })
			for range 50 {
				st := s.rep.Status()
				if st.State != Conflict || !strings.Contains(st.LastError, tc.says) {
					t.Fatalf("got %+v, want a conflict that says %q", st, tc.says)
				}
				if sp := s.spool.Status(); sp.Acked != 95 || sp.Last != 100 {
					t.Fatalf("spool %+v", sp)
				}
				time.Sleep(time.Millisecond)
			}
			repair()
			s.shipped()
		})
	}
}

// lie makes the gateway acknowledge a number, whatever it has.
func (g *gateway) lie(seq uint64) (stop func()) {
	g.set(func() {
		kept := g.recs
		fake := append(append([]*usagev1.Record(nil), kept...), &usagev1.Record{NodeSeq: seq})
		g.watermark = func(*usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error) {
			r := kept[len(kept)-1]
			g.set(func() { g.recs = kept })
			return &usagev1.WatermarkResponse{NodeSeq: r.NodeSeq, Hash: r.Hash}, nil
		}
		g.beforeAnswer = func(int) error { g.set(func() { g.recs = fake }); return nil }
		stop = func() { g.set(func() { g.recs, g.watermark, g.beforeAnswer = kept, nil, nil }) }
	})
	return stop
}

// A conflict waits, and nothing that happens at the spool makes it hurry.
func TestConflictIsRetriedSlowly(t *testing.T) {
	s := newSite(t)
	s.make(5)
	s.gw.beforeCommit = func(int) error { return status.Error(codes.FailedPrecondition, "no") }
	p := quick
	p.conflict = time.Hour
	s.start(p)
	s.until("conflict", func() bool { return s.rep.Status().State == Conflict })
	s.make(5)
	time.Sleep(50 * time.Millisecond)
	s.gw.set(func() {
		if len(s.gw.batches) != 1 {
			t.Errorf("%d batches, want 1", len(s.gw.batches))
		}
	})
}

// A gateway that takes nothing and does not say why is not asked in a hurry.
func TestGatewayTakesNothing(t *testing.T) {
	s := newSite(t)
	s.make(5)
	s.gw.watermark = func(*usagev1.WatermarkResponse) (*usagev1.WatermarkResponse, error) {
		return nil, status.Error(codes.PermissionDenied, "who are you?")
	}
	p := quick
	p.lastRetry = time.Hour
	s.start(p)
	time.Sleep(200 * time.Millisecond)
	s.gw.set(func() {
		if s.gw.marks > 12 {
			t.Errorf("asked %d times in 200 ms", s.gw.marks)
		}
	})
	if got := s.rep.Status(); got.State != Disconnected || !strings.Contains(got.LastError, "who are you?") {
		t.Errorf("got %+v", got)
	}
}

func TestBackoff(t *testing.T) {
	p := defaultPace
	for failures := range 100 {
		for range 20 {
			d := p.backoff(failures)
			if d > 30*time.Second || d < 50*time.Millisecond {
				t.Fatalf("after %d failures: %s", failures, d)
			}
			if failures < 3 && d > 700*time.Millisecond {
				t.Errorf("retry %d waits %s", failures, d)
			}
			if failures > 10 && d < 15*time.Second {
				t.Errorf("retry %d waits only %s", failures, d)
			}
		}
	}
}

func TestDamagedSpoolIsAConflict(t *testing.T) {
	err := fmt.Errorf("read: %w", &spool.CorruptError{File: "x", Reason: "y"})
	if ce := conflictOf(err); ce == nil || !errors.Is(ce, err) {
		t.Errorf("got %v", ce)
	}
	if ce := conflictOf(errors.New("anything")); ce != nil {
		t.Errorf("got %v", ce)
	}
}
