// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// Sentinels of Learn.
var (
	ErrPolicyMoved = errors.New("another policy is in force")     // the steps are of a program that is not, or is not known yet
	ErrLearnedFull = errors.New("too many addresses are learned") // forget some first
)

// learnedBatch is how many addresses one system call reads.
const learnedBatch = 512

// writeLearned writes l into an empty table of learned addresses; portRule makes
// its steps. When an address of the table in force was last used is carried
// over, or its name would seem idle after every change of policy.
//
// +checklocks:s.mu
func (e *Enforcer) writeLearned(m *ebpf.Map, s *slot, l []netpol.Learned, rules []uint32, limits limitIDs) error {
	for _, learned := range l {
		if len(learned.Steps) == 0 {
			continue
		}
		if err := putLearned(m, s.learned, learned, rules, limits); err != nil {
			return fmt.Errorf("write learned address %s: %w", learned.Addr, err)
		}
	}
	return nil
}

// putLearned writes one address. old is the table that knows when it was last
// used; nil if there is none.
func putLearned(m, old *ebpf.Map, l netpol.Learned, rules []uint32, limits limitIDs) error {
	k, err := addrKey(l.Addr)
	if err != nil {
		return err
	}
	var v bpf.DatapathBhLearned
	if len(l.Steps) > len(v.Rules) {
		return fmt.Errorf("%d steps, at most %d", len(l.Steps), len(v.Rules))
	}
	if old != nil {
		var was bpf.DatapathBhLearned
		err := old.Lookup(k, &was)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read last use: %w", err)
		}
		v.Used = was.Used
	}
	v.Count = uint32(len(l.Steps))
	for i, r := range l.Steps {
		if v.Rules[i], err = portRule(r, rules, limits); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	err = m.Put(k, v)
	if errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("%w: at most %d", ErrLearnedFull, m.MaxEntries())
	}
	return err
}

// addrKey is the key of a learned address.
func addrKey(a netip.Addr) (bpf.DatapathBhAddr, error) {
	if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
		return bpf.DatapathBhAddr{}, fmt.Errorf("address %s is not plain IPv4 or IPv6", a)
	}
	k := bpf.DatapathBhAddr{Family: networkOrder(6)}
	if a.Is4() {
		k.Family = networkOrder(4)
	}
	copy(k.Addr[:], a.AsSlice())
	return k, nil
}

// addrOf is the inverse of addrKey; the zero Addr for a key without a family.
func addrOf(k bpf.DatapathBhAddr) netip.Addr {
	switch k.Family {
	case networkOrder(4):
		return netip.AddrFrom4([4]byte(k.Addr[:4]))
	case networkOrder(6):
		return netip.AddrFrom16(k.Addr)
	}
	return netip.Addr{}
}

// Learn opens an address as l says, in addition to or instead of what was
// learned about it before. When it returns the kernel lets it pass. digest
// names the program that the steps of l belong to; ErrPolicyMoved if another
// one is in force, ErrLearnedFull if the sandbox has too many.
func (e *Enforcer) Learn(id string, n uint32, digest [32]byte, l netpol.Learned) error {
	return e.withLearned("learn", id, n, func(s *slot) error {
		if s.digest != digest || s.byID == nil {
			return ErrPolicyMoved
		}
		if len(l.Steps) == 0 {
			return fmt.Errorf("address %s: no steps", l.Addr)
		}
		if err := putLearned(s.learned, s.learned, l, s.byID, s.limits); err != nil {
			return fmt.Errorf("address %s: %w", l.Addr, err)
		}
		return nil
	})
}

// Forget closes an address that was learned. One that was not is no error.
func (e *Enforcer) Forget(id string, n uint32, addr netip.Addr) error {
	return e.withLearned("forget", id, n, func(s *slot) error {
		k, err := addrKey(addr)
		if err != nil {
			return err
		}
		if err := s.learned.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("address %s: %w", addr, err)
		}
		return nil
	})
}

// Learned answers the learned addresses of a sandbox and how long ago the last
// packet went to each, to the second; negative if there was none yet. While no
// process has the pins open, packets count as sent when it closed them.
func (e *Enforcer) Learned(id string, n uint32) (map[netip.Addr]time.Duration, error) {
	out := map[netip.Addr]time.Duration{}
	err := e.withLearned("read learned addresses", id, n, func(s *slot) error {
		now, err := bootSeconds()
		if err != nil {
			return err
		}
		return eachEntry(s.learned, learnedBatch, func(k bpf.DatapathBhAddr, v bpf.DatapathBhLearned) {
			since := -time.Second
			if v.Used != 0 {
				since = time.Duration(now-min(v.Used, now)) * time.Second
			}
			out[addrOf(k)] = since
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// withLearned runs do on the slot of a sandbox that has a policy.
func (e *Enforcer) withLearned(what, id string, n uint32, do func(*slot) error) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, n)
	if err != nil {
		return fmt.Errorf("%s for %s: %w", what, id, err)
	}
	defer s.mu.Unlock()
	if s.learned == nil {
		return fmt.Errorf("%s for %s: %w", what, id, ErrPolicyMoved)
	}
	if err := do(s); err != nil {
		return fmt.Errorf("%s for %s: %w", what, id, err)
	}
	return nil
}
