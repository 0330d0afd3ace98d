// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// Values of bh_slot.has.
const (
	hasAddr4 = 1
	hasAddr6 = 2
)

// Sandbox is what Attach needs to know of one.
type Sandbox struct {
	ID        string           // lower case letters and digits, at most 16
	Slot      uint32           // 1 to MaxSandboxes
	Ifindex   int              // host side of its veth, down until Attach has returned
	MAC       net.HardwareAddr // of the sandbox
	Addrs     []netip.Addr     // at most one of each family, inside Pools
	Program   netpol.Program
	PolicyRev uint64
	Learned   []netpol.Learned // of names; used if the policy is made anew
}

// hook is one of the two places where a program sits on a sandbox's link.
type hook struct {
	pin    string
	attach ebpf.AttachType
	prog   *ebpf.Program
}

func (e *Enforcer) hooks() [2]hook {
	return [2]hook{
		{"ingress", ebpf.AttachTCXIngress, e.fromSandbox},
		{"egress", ebpf.AttachTCXEgress, e.toSandbox},
	}
}

func (e *Enforcer) check(sb Sandbox) error {
	if sb.ID == "" || len(sb.ID) > len(bpf.DatapathBhSlot{}.Id) {
		return fmt.Errorf("id has %d characters, at most %d", len(sb.ID), len(bpf.DatapathBhSlot{}.Id))
	}
	for _, c := range []byte(sb.ID) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return fmt.Errorf("id holds %q, not only a-z and 0-9", c)
		}
	}
	if sb.Slot == 0 || sb.Slot > e.cfg.MaxSandboxes {
		return fmt.Errorf("slot %d is not in 1 to %d", sb.Slot, e.cfg.MaxSandboxes)
	}
	if sb.Ifindex <= 0 {
		return fmt.Errorf("ifindex %d", sb.Ifindex)
	}
	if len(sb.MAC) != 6 {
		return fmt.Errorf("MAC %q has %d bytes", sb.MAC, len(sb.MAC))
	}
	var has uint16
	for _, a := range sb.Addrs {
		bit := family(a)
		if a.Is4In6() || !a.IsValid() || a.Zone() != "" || has&bit != 0 {
			return fmt.Errorf("address %s: want one plain address of each family at most", a)
		}
		has |= bit
		inPool := slices.ContainsFunc(e.cfg.Pools, func(p netip.Prefix) bool { return p.Contains(a) })
		if !inPool && len(e.cfg.Pools) > 0 {
			return fmt.Errorf("address %s is in none of the pools, other sandboxes could be allowed to reach it", a)
		}
	}
	if has == 0 {
		return errors.New("no address")
	}
	return nil
}

func family(a netip.Addr) uint16 {
	if a.Is4() {
		return hasAddr4
	}
	return hasAddr6
}

// Attach puts the sandbox's link under its policy and returns only when the
// kernel enforces it, read back. Doing it again is no error: what is in place
// stays, counters go on, and what differs is put right. Counters start at zero
// when an id gets a slot for the first time, or again after Detach.
//
// After an error the sandbox must not start; Detach removes what was done. The
// ways to fail leave it denied.
//
// The kernel waits for its readers each time a program is attached, under the
// lock that all network configuration shares; nearly all the time that Attach
// takes goes there.
func (e *Enforcer) Attach(ctx context.Context, sb Sandbox) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	if err := e.check(sb); err != nil {
		return fmt.Errorf("attach %s: %w", sb.ID, err)
	}
	s := &e.slots[sb.Slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	steps := []struct {
		name string
		do   func() error
	}{
		{"take slot", func() error { return e.takeSlot(s, sb) }},
		{"set policy", func() error { return e.setPolicy(s, sb.Slot, sb.Program, sb.PolicyRev, sb.Learned) }},
		{"bind link", func() error { return e.bind(sb) }},
		{"attach ingress", func() error { return e.hooking.attach(sb.ID, sb.Ifindex, e.hooks()[0]) }},
		{"attach egress", func() error { return e.hooking.attach(sb.ID, sb.Ifindex, e.hooks()[1]) }},
		{"read back", func() error { return e.verify(sb.ID, sb.Slot, sb.Ifindex) }},
	}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("attach %s: %s: %w", sb.ID, step.name, err)
		}
		if err := step.do(); err != nil {
			return fmt.Errorf("attach %s: %s: %w", sb.ID, step.name, err)
		}
	}
	return nil
}

// takeSlot gives a free slot to the sandbox: counters at zero, then the id. A
// crash between the two does it again.
//
// +checklocks:s.mu
func (e *Enforcer) takeSlot(s *slot, sb Sandbox) (err error) {
	switch s.id {
	case sb.ID:
		return nil
	case "":
	default:
		return fmt.Errorf("%w: slot %d belongs to %s", ErrSlotTaken, sb.Slot, s.id)
	}
	if err := e.claim(sb.ID, sb.Slot); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			e.unclaim(sb.ID)
		}
	}()
	zero := make([]bpf.DatapathBhCounters, len(e.rules.zero))
	if err := e.maps["counters"].Put(sb.Slot, zero); err != nil {
		return fmt.Errorf("zero counters: %w", err)
	}
	if err := e.maps["drops"].Put(sb.Slot, bpf.DatapathBhDrops{}); err != nil {
		return fmt.Errorf("zero drop counters: %w", err)
	}
	if err := e.maps["echoes"].Put(sb.Slot, uint64(0)); err != nil {
		return fmt.Errorf("zero echo bucket: %w", err)
	}
	e.shm.values[sb.Slot].Epoch++
	e.shm.setID(sb.Slot, sb.ID)
	s.id, s.rules, s.digest = sb.ID, map[ruleKey]uint32{}, [32]byte{}
	return nil
}

// claim makes n the slot of id, unless id has another.
func (e *Enforcer) claim(id string, n uint32) error {
	e.ids.Lock()
	defer e.ids.Unlock()
	if has, ok := e.byID[id]; ok {
		return fmt.Errorf("%w: %s has slot %d", ErrSlotTaken, id, has)
	}
	e.byID[id] = n
	return nil
}

func (e *Enforcer) unclaim(id string) {
	e.ids.Lock()
	defer e.ids.Unlock()
	delete(e.byID, id)
}

// bind writes who may send on which link. The slot is closed while it changes.
func (e *Enforcer) bind(sb Sandbox) error {
	want := e.shm.values[sb.Slot]
	want.Mac = [6]uint8(sb.MAC)
	want.Has, want.Addr4, want.Addr6 = 0, 0, [2]uint64{}
	for _, a := range sb.Addrs {
		want.Has |= family(a)
		b := a.AsSlice()
		if a.Is4() {
			want.Addr4 = nativeUint32(b)
		} else {
			want.Addr6 = [2]uint64{nativeUint64(b[:8]), nativeUint64(b[8:])}
		}
	}
	have := &e.shm.values[sb.Slot]
	old, ifindex := e.shm.ifindex(sb.Slot), uint32(sb.Ifindex)
	same := have.Mac == want.Mac && have.Has == want.Has && have.Addr4 == want.Addr4 && have.Addr6 == want.Addr6
	if old != ifindex || !same {
		e.shm.setIfindex(sb.Slot, 0)
		have.Mac, have.Has, have.Addr4, have.Addr6 = want.Mac, want.Has, want.Addr4, want.Addr6
	}
	if old != ifindex {
		if err := e.unbind(sb.Slot, old); err != nil {
			return err
		}
	}
	if err := e.maps["links"].Put(ifindex, sb.Slot); err != nil {
		return fmt.Errorf("add link %d: %w", ifindex, err)
	}
	e.shm.setIfindex(sb.Slot, ifindex)
	return nil
}

// unbind removes the link from links if it is that of slot n.
func (e *Enforcer) unbind(n, ifindex uint32) error {
	var owner uint32
	err := e.maps["links"].Lookup(ifindex, &owner)
	if errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && owner != n {
		return nil
	}
	if err == nil {
		err = e.maps["links"].Delete(ifindex)
	}
	if err != nil {
		return fmt.Errorf("remove link %d: %w", ifindex, err)
	}
	return nil
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("program info: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("kernel gives no program ids")
	}
	return id, nil
}

// Verify asks the kernel whether the sandbox is enforced on this link right
// now: its slot, its policy, and our programs first at both hooks and held by
// its pins. Otherwise ErrNotEnforced.
func (e *Enforcer) Verify(id string, slot uint32, ifindex int) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return fmt.Errorf("verify %s: %w: %w", id, ErrNotEnforced, err)
	}
	defer s.mu.Unlock()
	if err := e.verify(id, slot, ifindex); err != nil {
		return fmt.Errorf("verify %s: %w", id, err)
	}
	return nil
}

func (e *Enforcer) verify(id string, n uint32, ifindex int) error {
	if has := e.shm.id(n); has != id {
		return fmt.Errorf("%w: slot %d belongs to %q", ErrNotEnforced, n, has)
	}
	if has := e.shm.ifindex(n); has != uint32(ifindex) {
		return fmt.Errorf("%w: slot %d is bound to link %d, not %d", ErrNotEnforced, n, has, ifindex)
	}
	var owner, inner uint32
	if err := e.maps["links"].Lookup(uint32(ifindex), &owner); err != nil || owner != n {
		return fmt.Errorf("%w: link %d is not bound to slot %d", ErrNotEnforced, ifindex, n)
	}
	if err := e.maps["policies"].Lookup(e.shm.policy(n), &inner); err != nil {
		return fmt.Errorf("%w: no policy", ErrNotEnforced)
	}
	for _, h := range e.hooks() {
		if err := e.hooking.verify(id, ifindex, h); err != nil {
			return err
		}
	}
	return nil
}

// Detach removes the programs from the sandbox's link and forgets its
// counters: read them before. An id that is not there is no error. With slot 0
// the id alone decides.
//
// A link that still exists has no program afterwards; take it down first.
func (e *Enforcer) Detach(id string, slot uint32) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	e.ids.Lock()
	n, ok := e.byID[id]
	e.ids.Unlock()
	if ok && slot != 0 && n != slot {
		return fmt.Errorf("detach %s: it has slot %d, not %d", id, n, slot)
	}
	if !ok {
		if err := e.removeLinks(id); err != nil {
			return fmt.Errorf("detach %s: %w", id, err)
		}
		e.disownFree(slot)
		return nil
	}
	s := &e.slots[n]
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := e.detach(s, id, n); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	return nil
}

// disownFree takes the budgets of a slot that nobody has: they were set for a
// sandbox that was never attached.
func (e *Enforcer) disownFree(n uint32) {
	if n == 0 || n > e.cfg.MaxSandboxes {
		return
	}
	s := &e.slots[n]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id == "" {
		e.disownLimits(n)
	}
}

// detach empties the slot. The id goes last: until then a crash makes the next
// Detach do it again.
//
// +checklocks:s.mu
func (e *Enforcer) detach(s *slot, id string, n uint32) error {
	if s.id != id { // by another Detach
		return nil
	}
	ifindex := e.shm.ifindex(n)
	e.shm.setIfindex(n, 0)
	if err := e.removeLinks(id); err != nil {
		return err
	}
	if ifindex != 0 {
		if err := e.unbind(n, ifindex); err != nil {
			return err
		}
	}
	policy := e.shm.policy(n)
	e.shm.setPolicy(n, 0, 0)
	gone, err := e.rules.forget(s.rules)
	if err != nil {
		return err
	}
	e.disownLimits(n)
	e.retire(s, policy, gone)
	e.shm.setID(n, "")
	s.id, s.rules, s.digest = "", nil, [32]byte{}
	e.unclaim(id)
	return nil
}

// removeLinks detaches and unpins what is pinned for id.
func (e *Enforcer) removeLinks(id string) error {
	if id == "" || id != filepath.Base(id) || id == "." || id == ".." {
		return fmt.Errorf("id %q", id)
	}
	return e.hooking.detach(id)
}

// Slots answers which sandbox has which slot.
func (e *Enforcer) Slots() (map[uint32]string, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	e.ids.Lock()
	defer e.ids.Unlock()
	out := make(map[uint32]string, len(e.byID))
	for id, n := range e.byID {
		out[n] = id
	}
	return out, nil
}

// List answers the ids that have a slot or pinned links, sorted.
func (e *Enforcer) List() ([]string, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	ids, err := e.pinned()
	if err != nil {
		return nil, err
	}
	e.ids.Lock()
	ids = slices.AppendSeq(ids, maps.Keys(e.byID))
	e.ids.Unlock()
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
