// SPDX-License-Identifier: Apache-2.0

package supervisortest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Process is one agent's view of a Machine.
type Process struct {
	m     *Machine
	fake  *runtimetest.Fake
	store supervisor.Store
	dead  atomic.Bool

	naming  sync.Mutex
	serving map[string]*resolver // +checklocks:naming; its sockets die with the process
}

// Process answers a view for an agent that starts now, on its store.
func (m *Machine) Process(st supervisor.Store) *Process {
	return &Process{m: m, fake: m.Node.Open(), store: st, serving: map[string]*resolver{}}
}

// Kill cuts the view off.
func (p *Process) Kill() {
	p.dead.Store(true)
	_ = p.fake.Close()
}

// Dead reports whether Kill was called.
func (p *Process) Dead() bool { return p.dead.Load() }

// enter is called before every operation.
func (p *Process) enter(op, id string) error {
	if p.dead.Load() {
		return ErrKilled
	}
	return p.m.fault(op, id)
}

// Links, Names, Budgets, Egress, Cgroups, Runtime, Store and Spool are what a
// supervisor.Config needs.
func (p *Process) Links() supervisor.Links      { return links{p} }
func (p *Process) Names() supervisor.Names      { return names{p} }
func (p *Process) Budgets() supervisor.Budgets  { return budgets{p} }
func (p *Process) Egress() supervisor.Egress    { return egress{p} }
func (p *Process) Cgroups() supervisor.Cgroups  { return cgroups{p} }
func (p *Process) Runtime() supervisor.Launcher { return launcher{p} }
func (p *Process) Store() supervisor.Store      { return store{p} }

// Spool puts the process between a supervisor and its spool.
func (p *Process) Spool(s supervisor.Spool) supervisor.Spool { return spool{p, s} }

type egress struct{ p *Process }

func (e egress) Attach(_ context.Context, x supervisor.Enforcement) error {
	if err := e.p.enter("egress.Attach", x.ID); err != nil {
		return err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if owner, ok := m.slots[x.Plan.Slot]; ok && owner != x.ID {
		m.violate("slot %d is %s's, wanted by %s", x.Plan.Slot, owner, x.ID)
		return fmt.Errorf("slot %d belongs to %s", x.Plan.Slot, owner)
	}
	have := m.programs[x.ID]
	if have == nil {
		have = &programState{slot: x.Plan.Slot}
		m.programs[x.ID] = have
		m.slots[x.Plan.Slot] = x.ID
	}
	have.ifindex, have.off = x.Ifindex, false
	m.put(x.ID, have, x.Program, x.Rev, x.Learned)
	return nil
}

// put gives a program a policy. The caller holds mu.
func (m *Machine) put(id string, have *programState, prog netpol.Program, rev uint64, learned []netpol.Learned) {
	for _, b := range prog.Budgets {
		if _, ok := m.budgets[budgetOf(b, have.slot)]; !ok {
			m.violate("policy of %s names a budget of %s that nobody has set", id, b.Tenant)
		}
	}
	have.program, have.rev, have.learned = prog, rev, map[netip.Addr][]netpol.PortRule{}
	for _, l := range learned {
		have.learned[l.Addr] = l.Steps
	}
}

func (e egress) SetPolicy(id string, _ uint32, prog netpol.Program, rev uint64, learned []netpol.Learned) error {
	if err := e.p.enter("egress.SetPolicy", id); err != nil {
		return err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.programs[id]
	if have == nil {
		return fmt.Errorf("policy of %s: %w", id, fs.ErrNotExist)
	}
	m.put(id, have, prog, rev, learned)
	return nil
}

func (e egress) Verify(id string, slot uint32, ifindex int) error {
	if err := e.p.enter("egress.Verify", id); err != nil {
		return err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.programs[id]
	if have == nil || have.off || have.slot != slot || have.ifindex != ifindex {
		return fmt.Errorf("verify %s: not enforced", id)
	}
	return nil
}

func (e egress) Traffic(slot uint32) (supervisor.Traffic, error) {
	if err := e.p.enter("egress.Traffic", ""); err != nil {
		return supervisor.Traffic{}, err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.programs[m.slots[slot]]
	if have == nil {
		return supervisor.Traffic{}, fmt.Errorf("counters of slot %d: %w", slot, fs.ErrNotExist)
	}
	return supervisor.Traffic{EgressBytes: have.egress, IngressBytes: have.ingress}, nil
}

func (e egress) Detach(id string, slot uint32) error {
	if err := e.p.enter("egress.Detach", id); err != nil {
		return err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.programs[id]
	if have == nil && m.slots[slot] != "" {
		return nil // it is another's
	}
	if have != nil {
		if l := m.links[id]; l != nil && l.up {
			m.violate("program of %s is taken off while its link is up", id)
		}
		slot = have.slot
		delete(m.slots, slot)
		delete(m.programs, id)
	}
	for key := range m.budgets {
		if slot != 0 && key.slot == slot {
			delete(m.budgets, key)
		}
	}
	return nil
}

func (e egress) List() ([]string, error) {
	if err := e.p.enter("egress.List", ""); err != nil {
		return nil, err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	return keys(m.programs), nil
}

func (e egress) Slots() (map[uint32]string, error) {
	if err := e.p.enter("egress.Slots", ""); err != nil {
		return nil, err
	}
	m := e.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.slots), nil
}

type cgroups struct{ p *Process }

func (c cgroups) Ensure(path string, q tenant.Quota) error {
	if err := c.p.enter("cgroups.Ensure", path); err != nil {
		return err
	}
	m := c.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quotas[path] = q
	return nil
}

func (c cgroups) Usage(_, id string) (supervisor.CgroupUsage, error) {
	if err := c.p.enter("cgroups.Usage", id); err != nil {
		return supervisor.CgroupUsage{}, err
	}
	m := c.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.leaves[id]
	if l == nil {
		return supervisor.CgroupUsage{}, fmt.Errorf("cgroup of %s: %w", id, fs.ErrNotExist)
	}
	cpu, memory, ooms := l.cpuNs, l.memory, l.ooms
	return supervisor.CgroupUsage{CPUNs: &cpu, MemoryUsed: &memory, OOMKills: &ooms}, nil
}

func (c cgroups) Kill(_, id string) error {
	if err := c.p.enter("cgroups.Kill", id); err != nil {
		return err
	}
	m := c.p.m
	m.mu.Lock()
	l := m.leaves[id]
	m.mu.Unlock()
	if l == nil {
		return fmt.Errorf("cgroup of %s: %w", id, fs.ErrNotExist)
	}
	t, err := m.fake.Find(context.Background(), id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := t.Kill(context.Background(), syscall.SIGKILL, true); !errors.Is(err, runtime.ErrNotRunning) {
		return err
	}
	return nil
}

func (c cgroups) WaitEmpty(ctx context.Context, _, id string) error {
	if err := c.p.enter("cgroups.WaitEmpty", id); err != nil {
		return err
	}
	t, err := c.p.m.fake.Find(ctx, id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = t.Wait(ctx)
	return err
}

func (c cgroups) Remove(_, id string) error {
	if err := c.p.enter("cgroups.Remove", id); err != nil {
		return err
	}
	m := c.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.leaves, id)
	return nil
}

func (c cgroups) List() ([]string, error) {
	if err := c.p.enter("cgroups.List", ""); err != nil {
		return nil, err
	}
	m := c.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	return keys(m.leaves), nil
}

type launcher struct{ p *Process }

func (l launcher) Image(ctx context.Context, ref string) (runtime.Image, error) {
	if err := l.p.enter("runtime.Image", ref); err != nil {
		return runtime.Image{}, err
	}
	return l.p.fake.Image(ctx, ref)
}

func (l launcher) Create(ctx context.Context, s runtime.Spec) (runtime.Task, error) {
	if err := l.p.enter("runtime.Create", s.ID); err != nil {
		return nil, err
	}
	t, err := l.p.fake.Create(ctx, s)
	if err != nil {
		return nil, err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leaves[s.ID] = &leaf{tenant: s.Labels["bulkhead.tenant"], memory: 10 << 20}
	return task{t, l.p}, nil
}

func (l launcher) Find(ctx context.Context, id string) (runtime.Task, error) {
	if err := l.p.enter("runtime.Find", id); err != nil {
		return nil, err
	}
	t, err := l.p.fake.Find(ctx, id)
	if err != nil {
		return nil, err
	}
	return task{t, l.p}, nil
}

func (l launcher) Remove(ctx context.Context, id string) error {
	if err := l.p.enter("runtime.Remove", id); err != nil {
		return err
	}
	return l.p.fake.Remove(ctx, id)
}

func (l launcher) List(ctx context.Context) ([]string, error) {
	if err := l.p.enter("runtime.List", ""); err != nil {
		return nil, err
	}
	return l.p.fake.List(ctx)
}

// task is a fake task whose start is watched.
type task struct {
	runtime.Task
	p *Process
}

// PID is nobody's: the fake's own numbers may be those of real processes.
func (t task) PID() uint32 { return 0 }

func (t task) Start(ctx context.Context) error {
	id := t.ID()
	if err := t.p.enter("task.Start", id); err != nil {
		return err
	}
	recs, err := t.p.store.Load()
	if err != nil {
		return err
	}
	onDisk := false
	for _, r := range recs {
		onDisk = onDisk || r.ID == id && r.State == sandbox.Running
	}
	if err := t.Task.Start(ctx); err != nil {
		return err
	}
	m := t.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if !onDisk {
		m.violate("%s was started without a record that says so", id)
	}
	if m.passes(id) == nil {
		m.violate("%s was started while it was not enforced", id)
	}
	if kernel := m.programs[id]; kernel != nil && t.p.resolver(id) == nil && slices.ContainsFunc(kernel.program.Names, func(n netpol.NameRule) bool { return !n.Deny }) {
		m.violate("%s may use names and was started without its resolver", id)
	}
	m.started[id] = true
	if m.busy > 0 {
		period := m.busy
		m.working.Go(func() { m.work(id, period) })
	}
	return nil
}

func (t task) Kill(ctx context.Context, sig syscall.Signal, all bool) error {
	if err := t.p.enter("task.Kill", t.ID()); err != nil {
		return err
	}
	return t.Task.Kill(ctx, sig, all)
}

func (t task) Status(ctx context.Context) (runtime.Status, error) {
	if err := t.p.enter("task.Status", t.ID()); err != nil {
		return runtime.Status{}, err
	}
	return t.Task.Status(ctx)
}

func (t task) Wait(ctx context.Context) (runtime.Exit, error) {
	if err := t.p.enter("task.Wait", t.ID()); err != nil {
		return runtime.Exit{}, err
	}
	return t.Task.Wait(ctx)
}

type store struct{ p *Process }

func (s store) Reserve(rec sandbox.Record, maxSlot uint32, taken map[uint32]string) (sandbox.Record, error) {
	if err := s.p.enter("store.Reserve", rec.ID); err != nil {
		return sandbox.Record{}, err
	}
	return s.p.store.Reserve(rec, maxSlot, taken)
}

func (s store) Put(rec sandbox.Record) error {
	if err := s.p.enter("store.Put", rec.ID); err != nil {
		return err
	}
	return s.p.store.Put(rec)
}

func (s store) PutAll(recs []sandbox.Record) error {
	if err := s.p.enter("store.PutAll", ""); err != nil {
		return err
	}
	return s.p.store.PutAll(recs)
}

func (s store) Load() ([]sandbox.Record, error) {
	if err := s.p.enter("store.Load", ""); err != nil {
		return nil, err
	}
	return s.p.store.Load()
}

func (s store) Release(id string) error {
	if err := s.p.enter("store.Release", id); err != nil {
		return err
	}
	return s.p.store.Release(id)
}

func (s store) Delete(id string) error {
	if err := s.p.enter("store.Delete", id); err != nil {
		return err
	}
	return s.p.store.Delete(id)
}

func (s store) PutMarks(marks map[string]meter.Mark) error {
	if err := s.p.enter("store.PutMarks", ""); err != nil {
		return err
	}
	return s.p.store.PutMarks(marks)
}

func (s store) Marks() (map[string]meter.Mark, error) {
	if err := s.p.enter("store.Marks", ""); err != nil {
		return nil, err
	}
	return s.p.store.Marks()
}

type spool struct {
	p *Process
	s supervisor.Spool
}

func (s spool) Append(ctx context.Context, recs []*usagev1.Record) error {
	if err := s.p.enter("spool.Append", ""); err != nil {
		return err
	}
	return s.s.Append(ctx, recs)
}

func (s spool) Forget(id string) error {
	if err := s.p.enter("spool.Forget", id); err != nil {
		return err
	}
	return s.s.Forget(id)
}
