// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
)

// box is one sandbox and the goroutine that owns it. Others read its record
// and send it stop requests; it alone launches, kills and tears down.
type box struct {
	s  *Supervisor
	id string

	mu      sync.Mutex
	rec     sandbox.Record // +checklocks:mu
	task    runtime.Task   // +checklocks:mu; nil when there is none
	ifindex int            // +checklocks:mu
	program netpol.Program // +checklocks:mu; in force
	// attached is the policy revision that the kernel was last given.
	attached  uint64    // +checklocks:mu
	verified  time.Time // +checklocks:mu; when the kernel last said that it is enforced
	degraded  string    // +checklocks:mu; why its link is down; "" if it is not
	neverRan  bool      // +checklocks:mu; found created and not started
	launchErr error     // +checklocks:mu; why the command was not let run
	holders   int       // +checklocks:mu; clients that still read
	let       time.Time // +checklocks:mu; when the last of them let go

	// repair is held while link and program of a running sandbox are put
	// right, so that nothing is made again that teardown has removed. Taken
	// before mu.
	repair  sync.Mutex
	drifted bool // +checklocks:repair; the link is down until a repair works
	repairs int  // +checklocks:repair; that have failed since then

	// stop wakes the goroutine for a request that is already on disk. Depth 8:
	// a polite request, an impatient one and some to spare; more are dropped,
	// since the record says what to do.
	stop     chan time.Duration
	launched chan struct{} // closed by the goroutine: Running, or never will be
	stopped  chan struct{} // closed by the goroutine: Stopped
}

func newBox(s *Supervisor, rec sandbox.Record) *box {
	b := &box{
		s:        s,
		id:       rec.ID,
		rec:      rec,
		stop:     make(chan time.Duration, 8),
		launched: make(chan struct{}),
		stopped:  make(chan struct{}),
	}
	if !rec.State.Live() {
		close(b.launched)
		close(b.stopped)
	}
	return b
}

func (b *box) record() sandbox.Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec.Clone()
}

// verifiedNow notes that the kernel has said that the sandbox is enforced.
func (b *box) verifiedNow() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.verified, b.degraded = time.Now(), ""
}

func (b *box) hold() (release func()) {
	b.mu.Lock()
	b.holders++
	b.mu.Unlock()
	return sync.OnceFunc(func() {
		b.mu.Lock()
		b.holders--
		b.let = time.Now()
		b.mu.Unlock()
	})
}

// held reports whether a client still reads from it.
func (b *box) held() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.holders > 0
}

// update changes the record, on disk first, and tells the subscribers. On an
// error nothing has changed.
func (b *box) update(change func(*sandbox.Record) error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.rec.Clone()
	if err := change(&next); err != nil {
		return err
	}
	if err := b.s.cfg.Store.Put(next); err != nil {
		return fmt.Errorf("record sandbox %s: %w", next.ID, err)
	}
	b.rec = next
	b.s.publish(next.Clone(), false) // under mu, so that subscribers see changes in their order
	return nil
}

// note adds an event. It is worth a line in the record but not a failure: if
// the disk refuses it, the log has it.
func (b *box) note(kind, format string, args ...any) {
	err := b.update(func(r *sandbox.Record) error {
		r.Log(time.Now(), kind, format, args...)
		return nil
	})
	b.s.cfg.Log.Info("sandbox event", "sandbox", b.id, "kind", kind, "message", fmt.Sprintf(format, args...), "err", err)
}

// errUnchanged makes update leave the record as it is.
var errUnchanged = errors.New("nothing to change")

// requestStop puts the reason on disk, if it is the first, or the end of its
// patience, if that is sooner, and wakes the goroutine. If the disk refuses,
// the sandbox is stopped all the same.
func (b *box) requestStop(req sandbox.StopRequest) error {
	err := b.update(func(r *sandbox.Record) error {
		switch sooner := req.At.Add(req.Grace); {
		case !r.State.Live():
			return errUnchanged
		case r.Stop == nil:
			r.Stop = &req
			r.Log(req.At, "stop", "%s, grace %s", describe(req), req.Grace)
		case sooner.Before(r.Stop.At.Add(r.Stop.Grace)):
			r.Stop.Grace = max(sooner.Sub(r.Stop.At), 0)
			r.Log(req.At, "stop", "sooner: %s, grace %s", describe(req), req.Grace)
		default:
			return errUnchanged // and nothing to write: anyone may ask as often as he likes
		}
		return nil
	})
	if errors.Is(err, errUnchanged) {
		err = nil
	}
	select {
	case b.stop <- req.Grace:
	default:
	}
	return err
}

func describe(req sandbox.StopRequest) string {
	if req.Message != "" {
		return req.Message
	}
	return fmt.Sprintf("%s, asked by %s", req.Reason, req.By)
}

// run drives the sandbox from begin (launch or adopt) to Stopped. It returns
// early when ctx ends: the daemon leaves, the sandbox lives.
func (b *box) run(ctx context.Context, begin func(context.Context) (ended *runtime.Exit)) {
	ended := begin(ctx)
	if ctx.Err() != nil {
		return
	}
	b.teardown(ctx, ended)
	if ctx.Err() == nil && b.record().Spec.AutoRemove {
		b.autoRemove(ctx)
	}
}

// finish does for a sandbox that was Stopped before a restart what is done
// after Stopped.
func (b *box) finish(ctx context.Context) {
	if b.release(ctx) && b.record().Spec.AutoRemove {
		b.autoRemove(ctx)
	}
}

// killAgain is how long KILL may take to end a command before it is sent again:
// what had to carry it may have been away.
const killAgain = 5 * time.Second

// follow waits until the command has ended, whoever ends it: itself, a request,
// its lifetime. nil means that it is not known how, or ctx is over.
func (b *box) follow(ctx context.Context, task runtime.Task) *runtime.Exit {
	waitCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	exits := make(chan *runtime.Exit, 1) // closed by nobody; one value at most
	b.s.group.Go(func() error {
		exits <- b.waitExit(waitCtx, task)
		return nil
	})
	var kill, ttl <-chan time.Time
	var killAt time.Time // of the most impatient request
	end := func(grace time.Duration) {
		grace = b.terminate(ctx, task, grace)
		if at := time.Now().Add(grace); killAt.IsZero() || at.Before(killAt) {
			killAt, kill = at, time.After(grace)
		}
	}
	rec := b.record()
	if rec.Spec.TTL > 0 {
		left := rec.Spec.TTL - (b.s.cfg.BootTime() - rec.StartedBoot)
		timer := time.NewTimer(max(left, 0))
		defer timer.Stop()
		ttl = timer.C
	}
	if rec.Stop != nil { // asked for before a restart
		end(max(time.Until(rec.Stop.At.Add(rec.Stop.Grace)), 0))
	}
	for {
		select {
		case exit := <-exits:
			return exit
		case grace := <-b.stop:
			if stop := b.record().Stop; stop != nil { // an impatient one may have found the channel full
				grace = min(grace, max(time.Until(stop.At.Add(stop.Grace)), 0))
			}
			end(grace)
		case <-ttl:
			ttl = nil
			if err := b.requestStop(sandbox.StopRequest{Reason: sandbox.TTL, By: "bulkhead", Grace: b.s.cfg.Grace, At: time.Now().UTC()}); err != nil {
				b.s.cfg.Log.Error("record the end of a lifetime", "sandbox", rec.ID, "err", err)
			}
		case <-kill:
			kill = time.After(killAgain)
			b.kill(ctx, task)
		case <-ctx.Done():
			return nil
		}
	}
}

// terminate asks the command to end and answers how long to wait for that. A
// first process of a pid namespace never gets a signal that it has no handler
// for, so without one there is nothing to wait for.
func (b *box) terminate(ctx context.Context, task runtime.Task, grace time.Duration) time.Duration {
	if grace > 0 && !catches(task.PID(), syscall.SIGTERM) {
		b.note("stop", "the command does not handle TERM: killed at once")
		grace = 0
	}
	if grace > 0 {
		if err := task.Kill(ctx, syscall.SIGTERM, false); err != nil && !errors.Is(err, runtime.ErrNotRunning) {
			b.s.cfg.Log.Warn("send TERM", "sandbox", task.ID(), "err", err)
		}
	}
	return grace
}

// kill sends KILL to everything in the sandbox: through its cgroup, which needs
// nobody's help, and through the runtime.
func (b *box) kill(ctx context.Context, task runtime.Task) {
	rec := b.record()
	var asked errgroup.Group // beside the other: the runtime may be away
	asked.Go(func() error { return task.Kill(ctx, syscall.SIGKILL, true) })
	cgErr := b.s.cfg.Cgroups.Kill(string(rec.Spec.Tenant), rec.ID)
	err := asked.Wait()
	if cgErr != nil && err != nil && !errors.Is(err, runtime.ErrNotRunning) {
		b.s.cfg.Log.Warn("kill sandbox", "sandbox", rec.ID, "err", errors.Join(cgErr, err))
	}
}

// catches reports whether a process has a handler for a signal; true if that
// cannot be known.
func catches(pid uint32, sig syscall.Signal) bool {
	data, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(pid), 10) + "/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(data)) {
		if mask, ok := strings.CutPrefix(line, "SigCgt:"); ok {
			v, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			return err != nil || v&(1<<(sig-1)) != 0
		}
	}
	return true
}

// waitExit waits for the end of a task. A runtime that is away is asked again
// until it answers; nil means that the runtime certainly no longer knows it,
// or that ctx is over.
func (b *box) waitExit(ctx context.Context, task runtime.Task) *runtime.Exit {
	backoff := 50 * time.Millisecond
	for {
		exit, err := task.Wait(ctx)
		switch {
		case err == nil:
			return &exit
		case ctx.Err() != nil || errors.Is(err, runtime.ErrNotFound):
			return nil
		}
		b.s.cfg.Log.Warn("wait for sandbox; asking again", "sandbox", task.ID(), "err", err)
		if !sleep(ctx, backoff) {
			return nil
		}
		backoff = min(2*backoff, 5*time.Second)
		found, err := b.s.cfg.Runtime.Find(ctx, task.ID())
		switch {
		case err == nil:
			task = found
			b.mu.Lock()
			b.task = found
			b.mu.Unlock()
		case errors.Is(err, runtime.ErrNotFound):
			return nil
		}
	}
}

// autoRemove forgets a stopped sandbox once no client reads from it any more.
func (b *box) autoRemove(ctx context.Context) {
	b.mu.Lock()
	b.let = time.Now()
	b.mu.Unlock()
	for {
		if !sleep(ctx, b.s.cfg.LingerRemove/4) {
			return
		}
		b.mu.Lock()
		idle := b.holders == 0 && time.Since(b.let) >= b.s.cfg.LingerRemove
		b.mu.Unlock()
		if !idle {
			continue
		}
		if err := b.s.Delete(b.id); err != nil && !errors.Is(err, ErrNotFound) {
			b.s.cfg.Log.Error("remove stopped sandbox", "sandbox", b.id, "err", err)
			continue
		}
		return
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
