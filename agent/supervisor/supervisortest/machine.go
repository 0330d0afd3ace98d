// SPDX-License-Identifier: Apache-2.0

// Package supervisortest has a working miniature of the machine that a
// supervisor works on: links, the egress program, cgroups and the fake
// container runtime of runtime/runtimetest.
//
// A Machine is what outlives a process. Process answers one agent's view of
// it; Kill cuts that view off in the middle of whatever it does, as kill -9
// would, and nothing that it asks for afterwards happens. The machine keeps its
// own account of every byte and nanosecond, and of every rule that an agent has
// broken: a command that runs without a record, a link that is up without the
// program, two sandboxes in one slot.
//
// It works inside a testing/synctest bubble.
//
// Lock order: none; Machine.mu is never held while a runtime is called.
package supervisortest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Image is the one that every Machine has.
const Image = "busybox"

// Machine is links, programs, cgroups and containers.
type Machine struct {
	Node *runtimetest.Node // the container runtime's side

	// Fault, if set, is called before every operation, with its name, such as
	// links.Create or store.Put, and the sandbox it is about. An error that it
	// answers is the operation's, and nothing has happened. Set it before the
	// first Process, or with SetFault.
	Fault func(op, id string) error

	fake   *runtimetest.Fake // the machine's own hands
	booted time.Time

	mu         sync.Mutex
	links      map[string]*linkState
	programs   map[string]*programState
	slots      map[uint32]string // of programs
	journals   map[string][]lesson
	budgets    map[budgetKey]uint64 // limits
	table      string               // what is wrong with it
	leaves     map[string]*leaf
	quotas     map[string]tenant.Quota
	truth      map[string]*Account
	started    map[string]bool
	ifindex    int
	busy       time.Duration
	working    sync.WaitGroup // busy commands
	violations []string
}

type linkState struct {
	plan    sandbox.Plan
	ifindex int
	up      bool
	ports   []sandbox.Port
	drift   string // what is wrong with it
}

// lesson is one name that a sandbox has resolved.
type lesson struct {
	name string
	addr netip.Addr
}

// budgetKey names a budget of the kernel; slot 0 is the tenant's.
type budgetKey struct {
	tenant string
	slot   uint32
}

type programState struct {
	slot            uint32
	ifindex         int
	program         netpol.Program
	learned         map[netip.Addr][]netpol.PortRule
	rev             uint64
	egress, ingress uint64
	off             bool // somebody took it off its link
}

type leaf struct {
	tenant string
	cpuNs  uint64
	memory uint64
	ooms   uint64
}

// Account is what the machine knows that a sandbox has used.
type Account struct{ EgressBytes, IngressBytes, CPUNs uint64 }

// NewMachine answers a machine that was booted an hour ago.
func NewMachine() *Machine {
	m := &Machine{
		Node:     runtimetest.NewNode(),
		booted:   time.Now().Add(-time.Hour),
		links:    map[string]*linkState{},
		programs: map[string]*programState{},
		slots:    map[uint32]string{},
		journals: map[string][]lesson{},
		budgets:  map[budgetKey]uint64{},
		leaves:   map[string]*leaf{},
		quotas:   map[string]tenant.Quota{},
		truth:    map[string]*Account{},
		started:  map[string]bool{},
	}
	m.Node.AddImage("docker.io/library/busybox:latest")
	m.fake = m.Node.Open()
	return m
}

// BootTime is CLOCK_BOOTTIME.
func (m *Machine) BootTime() time.Duration { return time.Since(m.booted) }

// SetFault replaces Fault while the machine is in use.
func (m *Machine) SetFault(f func(op, id string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Fault = f
}

func (m *Machine) fault(op, id string) error {
	m.mu.Lock()
	f := m.Fault
	m.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(op, id)
}

// SetBusy makes every command that is started from now on send, receive and
// compute a little, again and again after a period, for as long as it runs.
func (m *Machine) SetBusy(period time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy = period
}

// Settle waits until every busy command has seen that it is over.
func (m *Machine) Settle() { m.working.Wait() }

// work is what a busy command does.
func (m *Machine) work(id string, period time.Duration) {
	for {
		time.Sleep(period)
		if !m.Running(id) {
			return
		}
		m.Send(id, 977)
		m.Receive(id, 1511)
		m.Burn(id, 13*time.Millisecond)
	}
}

func (m *Machine) account(id string) *Account {
	a := m.truth[id]
	if a == nil {
		a = &Account{}
		m.truth[id] = a
	}
	return a
}

// Account answers what a sandbox has used.
func (m *Machine) Account(id string) Account {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *m.account(id)
}

// Running reports whether the command of a sandbox runs now.
func (m *Machine) Running(id string) bool {
	t, err := m.fake.Find(context.Background(), id)
	if err != nil {
		return false
	}
	st, err := t.Status(context.Background())
	return err == nil && st.State == runtime.StateRunning
}

// Ran reports whether the command of a sandbox was ever let run.
func (m *Machine) Ran(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.started[id]
}

// passes answers the program that a packet of a sandbox meets; nil if there is
// none or the link is down.
func (m *Machine) passes(id string) *programState {
	l, p := m.links[id], m.programs[id]
	if l == nil || !l.up || p == nil || p.off || p.ifindex != l.ifindex {
		return nil
	}
	return p
}

// Send lets a sandbox send to a destination that its policy allows, and
// reports whether it went out.
func (m *Machine) Send(id string, bytes uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.passes(id)
	if p == nil {
		return false
	}
	p.egress += bytes
	m.account(id).EgressBytes += bytes
	return true
}

// SendTo is Send with a flow that the policy in force judges.
func (m *Machine) SendTo(id string, f netpol.Flow, bytes uint64) bool {
	m.mu.Lock()
	p := m.passes(id)
	allowed := p != nil && (p.program.Evaluate(f).Allowed || taught(p.learned[f.Dst], f))
	m.mu.Unlock()
	return allowed && m.Send(id, bytes)
}

func taught(steps []netpol.PortRule, f netpol.Flow) bool {
	for _, s := range steps {
		if s.Proto == f.Proto && s.Lo <= f.Port && f.Port <= s.Hi {
			return true
		}
	}
	return false
}

// Receive lets a sandbox receive.
func (m *Machine) Receive(id string, bytes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.passes(id); p != nil {
		p.ingress += bytes
		m.account(id).IngressBytes += bytes
	}
}

// Burn lets a sandbox use CPU time.
func (m *Machine) Burn(id string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.leaves[id]; l != nil {
		l.cpuNs += uint64(d)
		m.account(id).CPUNs += uint64(d)
	}
}

// OOM says that the kernel has killed something in the sandbox for want of
// memory.
func (m *Machine) OOM(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.leaves[id]; l != nil {
		l.ooms++
	}
}

// TakeOff takes the program off a sandbox's link, as a hand with bpftool could.
func (m *Machine) TakeOff(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.programs[id]; p != nil {
		p.off = true
	}
}

// Disturb changes something about a sandbox's link behind the agent's back.
func (m *Machine) Disturb(id, what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.links[id]; l != nil {
		l.drift = what
	}
}

// DisturbTable changes what all links share.
func (m *Machine) DisturbTable(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.table = what
}

// PolicyRev answers the revision of the policy that judges a sandbox.
func (m *Machine) PolicyRev(id string) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.programs[id]; p != nil {
		return p.rev
	}
	return 0
}

// Published answers the ports of the node that lead to a sandbox.
func (m *Machine) Published(id string) []sandbox.Port {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.links[id]; l != nil {
		return slices.Clone(l.ports)
	}
	return nil
}

// Budget answers the limit of a budget in the kernel; slot 0 is the tenant's.
func (m *Machine) Budget(tenant string, slot uint32) (limit uint64, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	limit, ok = m.budgets[budgetKey{tenant, slot}]
	return limit, ok
}

// LinkUp reports whether a sandbox's link is up.
func (m *Machine) LinkUp(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.links[id] != nil && m.links[id].up
}

// Quota answers the limits of a tenant's cgroup.
func (m *Machine) Quota(path string) (tenant.Quota, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	q, ok := m.quotas[path]
	return q, ok
}

// Reboot takes everything away that does not outlive the kernel.
func (m *Machine) Reboot() {
	ids, _ := m.fake.List(context.Background())
	for _, id := range ids {
		_ = m.fake.Remove(context.Background(), id)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.links)
	clear(m.programs)
	clear(m.slots)
	clear(m.leaves)
	clear(m.quotas)
	clear(m.journals)
	clear(m.budgets)
	m.table = ""
	m.booted = time.Now()
}

// Leftovers names everything of sandboxes that is on the machine.
func (m *Machine) Leftovers() []string {
	var out []string
	ids, err := m.fake.List(context.Background())
	if err != nil {
		out = append(out, "containers: "+err.Error())
	}
	for _, id := range ids {
		out = append(out, "container "+id)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.links {
		out = append(out, "link "+id)
	}
	for id := range m.programs {
		out = append(out, "program "+id)
	}
	for id := range m.leaves {
		out = append(out, "cgroup "+id)
	}
	for id := range m.journals {
		out = append(out, "names "+id)
	}
	for key := range m.budgets {
		if key.slot != 0 {
			out = append(out, fmt.Sprintf("budget of slot %d", key.slot))
		}
	}
	slices.Sort(out)
	return out
}

// Violations answers the rules that agents have broken.
func (m *Machine) Violations() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.violations)
}

// violate notes a broken rule. The caller holds mu.
func (m *Machine) violate(format string, args ...any) {
	m.violations = append(m.violations, fmt.Sprintf(format, args...))
}

func keys[V any](in map[string]V) []string {
	return slices.Sorted(maps.Keys(in))
}

// ErrKilled is what a killed process gets for an answer.
var ErrKilled = errors.New("this process was killed")
