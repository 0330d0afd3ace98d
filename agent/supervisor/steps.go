// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/place"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
)

// step is one thing a launch does to the machine. do and undo may be repeated,
// and undo may be called when do never was.
type step struct {
	wave     int
	name     string
	do, undo func(context.Context) error
}

// steps of a sandbox; the table is in the package documentation.
func (b *box) steps() []step {
	cfg := &b.s.cfg
	rec := b.record()
	id, path := rec.ID, string(rec.Spec.Tenant)
	return []step{
		{0, "cgroup",
			func(context.Context) error { return b.s.ensureTenant(rec.Spec.Tenant) },
			func(context.Context) error { return cfg.Cgroups.Remove(path, id) }},
		{0, "link",
			func(ctx context.Context) error {
				_, err := b.link(ctx)
				return err
			},
			func(context.Context) error { return cfg.Links.Remove(id) }},
		{1, "egress", b.attach,
			func(context.Context) error {
				if err := cfg.Budgets.Release(id, rec.Slot); err != nil {
					return err
				}
				return cfg.Egress.Detach(id, rec.Slot)
			}},
		{1, "task",
			func(ctx context.Context) error {
				task, err := cfg.Runtime.Create(ctx, b.runtimeSpec())
				b.mu.Lock()
				b.task = task
				b.mu.Unlock()
				return err
			},
			func(ctx context.Context) error { return cfg.Runtime.Remove(ctx, id) }},
		{2, "names", b.startNames,
			func(context.Context) error { return cfg.Names.Stop(id) }},
		{3, "start", b.start, b.quiesce},
	}
}

// launch places the sandbox and does its steps. It answers how the command
// ended, or nil if it never ran or that is not known.
func (b *box) launch(ctx context.Context) *runtime.Exit {
	defer b.closeLaunched()
	err := b.place()
	if err == nil {
		err = b.doSteps(ctx)
	}
	if ctx.Err() != nil {
		return nil // recovery undoes what there is
	}
	if err != nil {
		b.s.cfg.Log.Error("launch sandbox", "sandbox", b.id, "err", err)
		b.failLaunch(err)
		return nil
	}
	b.closeLaunched()
	b.mu.Lock()
	task := b.task
	b.mu.Unlock()
	return b.follow(ctx, task)
}

func (b *box) closeLaunched() {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.launched:
	default:
		close(b.launched)
	}
}

// place names and reserves resources, on disk before any of them exists.
func (b *box) place() error {
	if err := b.s.fault("place"); err != nil {
		return err
	}
	rec := b.record()
	plan, err := place.Place(b.s.cfg.Place, rec.ID, rec.Spec.Tenant, rec.Slot)
	if err != nil {
		return err
	}
	return b.update(func(r *sandbox.Record) error {
		r.Plan = &plan
		return r.To(sandbox.Placed)
	})
}

// doSteps runs the waves in order and the steps of a wave side by side.
func (b *box) doSteps(ctx context.Context) error {
	steps := b.steps()
	for len(steps) > 0 {
		var wave errgroup.Group
		n := 0
		for n < len(steps) && steps[n].wave == steps[0].wave {
			st := steps[n]
			wave.Go(func() error {
				if err := b.s.fault(st.name + ":do"); err != nil {
					return fmt.Errorf("step %s: %w", st.name, err)
				}
				began := time.Now()
				if err := st.do(ctx); err != nil {
					return fmt.Errorf("step %s: %w", st.name, err)
				}
				b.s.cfg.Log.Debug("launch step", "sandbox", b.id, "step", st.name, "took", time.Since(began))
				if err := b.s.fault(st.name + ":done"); err != nil {
					return fmt.Errorf("step %s: %w", st.name, err)
				}
				return nil
			})
			n++
		}
		if err := wave.Wait(); err != nil {
			return err
		}
		steps = steps[n:]
	}
	return nil
}

// failLaunch records why the command never ran. If not even that can be
// written, teardown tries again.
func (b *box) failLaunch(err error) {
	b.mu.Lock()
	b.launchErr = err
	b.mu.Unlock()
	uerr := b.update(func(r *sandbox.Record) error {
		r.Exit = &sandbox.Exit{Reason: sandbox.LaunchFailed, Code: -1, Message: err.Error(), Time: time.Now().UTC()}
		r.Log(time.Now(), "launch_failed", "%v", err)
		return r.To(sandbox.Stopping)
	})
	if uerr != nil {
		b.s.cfg.Log.Error("record a failed launch", "sandbox", b.id, "err", uerr)
	}
}

// start lets the command run. Egress is read back from the kernel first, and
// Running is on disk first: from here on usage is owed.
func (b *box) start(ctx context.Context) error {
	b.mu.Lock()
	task, ifindex, slot, id := b.task, b.ifindex, b.rec.Slot, b.rec.ID
	stop := b.rec.Stop
	b.mu.Unlock()
	if stop != nil {
		return fmt.Errorf("stopped before it started: %s", describe(*stop))
	}
	if err := b.s.cfg.Egress.Verify(id, slot, ifindex); err != nil {
		return err
	}
	if err := b.s.cfg.Links.Up(id); err != nil {
		return err
	}
	b.verifiedNow()
	for {
		err := b.update(func(r *sandbox.Record) error {
			if r.PolicyRev != b.attached {
				return errPolicyMoved
			}
			r.Started = time.Now().UTC()
			r.StartedBoot = b.s.cfg.BootTime()
			r.Log(r.Started, "started", "%s %s", r.Plan.Addr4, r.Plan.Addr6)
			return r.To(sandbox.Running)
		})
		if err == nil {
			break
		}
		if !errors.Is(err, errPolicyMoved) {
			return err
		}
		if err := b.attach(ctx); err != nil {
			return err
		}
	}
	if err := b.s.fault("start:recorded"); err != nil {
		return err
	}
	return task.Start(ctx)
}

// quiesce ends everything in the sandbox and takes the last usage sample:
// after the last process is gone, before anything that counts is removed.
func (b *box) quiesce(ctx context.Context) error {
	cfg := &b.s.cfg
	rec := b.record()
	path := string(rec.Spec.Tenant)
	if err := cfg.Cgroups.Kill(path, rec.ID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	emptyCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := cfg.Cgroups.WaitEmpty(emptyCtx, path, rec.ID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := cfg.Links.Down(rec.ID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if rec.Started.IsZero() || rec.Final != nil {
		return nil
	}
	// A sample of the meter's own must not come between: it would lie after
	// the last one.
	b.s.metering.Lock()
	defer b.s.metering.Unlock()
	sample := b.s.lastSample(rec)
	return b.update(func(r *sandbox.Record) error {
		r.Final = &sample
		return nil
	})
}

// teardown brings a sandbox to Stopped: undo every step, from the last to the
// first, until it works; put the final usage into the spool; then say so.
func (b *box) teardown(ctx context.Context, ended *runtime.Exit) {
	if !b.persist(ctx, "stopping", func(r *sandbox.Record) error { return b.conclude(r, ended) }) {
		return
	}
	b.awaitRepair()
	b.s.warn("degraded "+b.id, "")
	b.s.warn("policy "+b.id, "")
	b.closeLaunched()
	if !b.undoSteps(ctx) {
		return
	}
	rec := b.record()
	if rec.Final != nil {
		if !b.until(ctx, "usage", func() error { return b.s.meterFinal(ctx, rec) }) {
			return
		}
	}
	b.mu.Lock()
	b.task = nil
	b.mu.Unlock()
	ok := b.persist(ctx, "stopped", func(r *sandbox.Record) error {
		r.Log(time.Now(), "stopped", "%s", r.Exit.Message)
		return r.To(sandbox.Stopped)
	})
	if !ok || !b.release(ctx) {
		return
	}
	b.s.cfg.Log.Info("sandbox stopped", "sandbox", rec.ID, "tenant", rec.Spec.Tenant, "reason", rec.Exit.Reason, "code", rec.Exit.Code)
	close(b.stopped)
	b.s.forgetOldest(rec.Spec.Tenant)
}

// awaitRepair returns once a repair that has begun is over; one that comes
// later sees Stopping and does nothing.
func (b *box) awaitRepair() {
	b.repair.Lock()
	defer b.repair.Unlock()
}

// undoSteps undoes the waves from the last to the first, the steps of a wave
// side by side. False: ctx is over first.
func (b *box) undoSteps(ctx context.Context) bool {
	steps := b.steps()
	for len(steps) > 0 {
		var wave errgroup.Group
		last := steps[len(steps)-1].wave
		for len(steps) > 0 && steps[len(steps)-1].wave == last {
			st := steps[len(steps)-1]
			steps = steps[:len(steps)-1]
			wave.Go(func() error {
				began := time.Now()
				if !b.until(ctx, st.name+":undo", func() error { return st.undo(ctx) }) {
					return ctx.Err()
				}
				b.s.cfg.Log.Debug("teardown step", "sandbox", b.id, "step", st.name, "took", time.Since(began))
				return nil
			})
		}
		if wave.Wait() != nil {
			return false
		}
	}
	return true
}

// release gives back what a Stopped sandbox still holds. Stopped is on disk
// first, so after a crash in between the next agent does it.
func (b *box) release(ctx context.Context) bool {
	if !b.until(ctx, "release", func() error { return b.s.cfg.Store.Release(b.id) }) {
		return false
	}
	if err := b.s.cfg.Spool.Forget(b.id); err != nil {
		b.s.cfg.Log.Warn("forget usage index", "sandbox", b.id, "err", err)
	}
	return true
}

// conclude moves a record to Stopping and says how the command ended. The
// cgroup still exists, so the kernel's own OOM counter is asked.
func (b *box) conclude(r *sandbox.Record, ended *runtime.Exit) error {
	if r.State != sandbox.Stopping {
		if err := r.To(sandbox.Stopping); err != nil {
			return err
		}
	}
	if r.Exit != nil {
		return nil
	}
	if ended == nil {
		r.Exit = &sandbox.Exit{Reason: sandbox.LostExit, Code: -1, Time: time.Now().UTC(),
			Message: "the machine no longer has it: the node was rebooted or the runtime lost it"}
		switch {
		case b.launchErr != nil:
			r.Exit.Reason, r.Exit.Message = sandbox.LaunchFailed, b.launchErr.Error()
		case r.Started.IsZero() || b.neverRan:
			r.Exit.Reason, r.Exit.Message = sandbox.LaunchFailed, "the agent was restarted during the launch"
		}
		return nil
	}
	usage, err := b.s.cfg.Cgroups.Usage(string(r.Spec.Tenant), r.ID)
	if err != nil {
		b.s.cfg.Log.Warn("read cgroup of ended sandbox", "sandbox", r.ID, "err", err)
	}
	exit := sandbox.Ended{
		Code:      int(ended.Code),
		Time:      ended.Time,
		OOMKilled: ended.OOMKilled || usage.OOMKills != nil && *usage.OOMKills > 0,
		Limits:    r.Spec.Limits,
		TTL:       r.Spec.TTL,
		Stop:      r.Stop,
	}.Explain()
	r.Exit = &exit
	r.Log(exit.Time, string(exit.Reason), "%s", exit.Message)
	return nil
}

// until repeats what must happen until it does. False: ctx is over first.
func (b *box) until(ctx context.Context, what string, do func() error) bool {
	backoff := 20 * time.Millisecond
	for attempt := 0; ; attempt++ {
		err := b.s.fault(what)
		if err == nil {
			err = do()
		}
		if err == nil {
			if attempt > 0 {
				b.s.warn("stuck "+b.id, "")
			}
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		b.s.cfg.Log.Warn("tear down sandbox; trying again", "sandbox", b.id, "step", what, "err", err)
		if attempt == 5 {
			b.s.warn("stuck "+b.id, fmt.Sprintf("sandbox %s (%s) cannot be torn down, still trying: %s: %v", b.record().Spec.Name, b.id, what, err))
		}
		if !sleep(ctx, backoff) {
			return false
		}
		backoff = min(2*backoff, 10*time.Second)
	}
}

func (b *box) persist(ctx context.Context, what string, change func(*sandbox.Record) error) bool {
	return b.until(ctx, what, func() error { return b.update(change) })
}

// errPolicyMoved: a reload came between attaching the policy and starting.
var errPolicyMoved = errors.New("policy changed during the launch")

// link makes the network of the sandbox, with the ports that it publishes.
func (b *box) link(ctx context.Context) (ifindex int, err error) {
	rec := b.record()
	if ifindex, err = b.s.cfg.Links.Create(ctx, rec.ID, *rec.Plan); err != nil {
		return 0, err
	}
	b.mu.Lock()
	b.ifindex = ifindex
	b.mu.Unlock()
	if len(rec.Spec.Publish) == 0 {
		return ifindex, nil
	}
	return ifindex, b.s.cfg.Links.Publish(rec.ID, rec.Spec.Publish)
}

// startNames begins to answer the sandbox's questions for names. The program
// must be attached: what was learned before goes into it. If a reload comes in
// between, start attaches once more, and that is what the resolver works by.
func (b *box) startNames(ctx context.Context) error {
	b.mu.Lock()
	plan, program := *b.rec.Plan, b.program
	b.mu.Unlock()
	return b.s.cfg.Names.Start(ctx, b.id, plan.Slot, plan.NetnsPath, program)
}

// attach gives the kernel the policy in force, and the resolver if it has
// begun, and remembers which it was.
func (b *box) attach(ctx context.Context) error {
	b.mu.Lock()
	e := Enforcement{ID: b.id, Plan: *b.rec.Plan, Ifindex: b.ifindex, Program: b.program, Rev: b.rec.PolicyRev}
	b.mu.Unlock()
	err := b.enforce(e.Plan.Slot, e.Program, func(learned []netpol.Learned) error {
		e.Learned = learned
		return b.s.cfg.Egress.Attach(ctx, e)
	})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attached = e.Rev
	return nil
}

func (b *box) runtimeSpec() runtime.Spec {
	rec, cfg := b.record(), &b.s.cfg
	return runtime.Spec{
		ID:          rec.ID,
		Image:       rec.Spec.Image,
		Command:     rec.Spec.Command,
		Env:         rec.Spec.Env,
		Workdir:     rec.Spec.Workdir,
		User:        rec.Spec.User,
		Hostname:    hostname(rec.Spec.Name),
		CgroupPath:  strings.TrimPrefix(rec.Plan.CgroupPath, "/"),
		NetnsPath:   rec.Plan.NetnsPath,
		CPUMillis:   rec.Spec.Limits.CPUMillis,
		MemoryBytes: rec.Spec.Limits.MemoryBytes,
		PIDs:        rec.Spec.Limits.PIDs,
		Terminal:    rec.Spec.Terminal,
		Stdin:       rec.Spec.Stdin,
		LogDir:      rec.Plan.LogDir,
		LogMaxBytes: cfg.LogMaxBytes,
		LogFiles:    cfg.LogFiles,
		ResolvConf:  cfg.ResolvConf,
		Hosts:       cfg.Hosts,
		Partial:     cfg.Partial,
		Labels: map[string]string{
			"bulkhead.tenant": string(rec.Spec.Tenant),
			"bulkhead.name":   rec.Spec.Name,
			"bulkhead.slot":   strconv.FormatUint(uint64(rec.Slot), 10),
		},
	}
}

// hostname is a name made fit for uname: at most 63 of letters, digits, '-'.
func hostname(name string) string {
	out := []byte(name)
	for i, c := range out {
		if c == '_' || c == '.' {
			out[i] = '-'
		}
	}
	return string(out)
}
