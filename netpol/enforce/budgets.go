// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// Budget is how much a tenant, or one sandbox by a policy of that tenant, may
// send in a window.
type Budget struct {
	Tenant string
	Slot   uint32 // of the sandbox; 0: all sandboxes of the tenant and below on this node
	Window uint64 // when it began, in seconds since 1970
	Limit  uint64 // bytes
	Spent  uint64 // bytes; used only if the kernel has not this window yet
}

// BudgetState is what is known of a budget.
type BudgetState struct {
	Tenant       string
	Slot         uint32
	Window       uint64
	Limit, Spent uint64 // bytes
}

// windowBits is how much of bh_budget.window counts how often it was set anew;
// above it is when the window began. The counter makes sure that no lease of
// another window, or of an earlier owner, is taken for one of this.
const windowBits = 16

// leaseTries bounds how often a budget is read again because programs took
// from it meanwhile.
const leaseTries = 8

// SetBudget makes or changes the budget that policies refer to as Tenant's; call
// it before a policy does, which otherwise makes one with nothing left. The
// first call for a window makes Limit - Spent bytes available and voids what is
// left of the window before; later ones change the limit alone, at once, and
// what was spent stays spent. After a lower limit CPUs may still send what they
// have leased, at most 64 KiB each.
//
// Nothing that the programs do meanwhile makes more than Limit bytes pass in a
// window. A CPU that leases bytes while the window changes may lose that lease:
// it counts as spent.
func (e *Enforcer) SetBudget(b Budget) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	if err := e.setBudget(b); err != nil {
		return fmt.Errorf("set budget of %s: %w", b.Tenant, err)
	}
	return nil
}

func (e *Enforcer) setBudget(b Budget) error {
	switch {
	case b.Tenant == "":
		return errors.New("no tenant")
	case b.Slot > e.cfg.MaxSandboxes:
		return fmt.Errorf("slot %d is not in 0 to %d", b.Slot, e.cfg.MaxSandboxes)
	case b.Window == 0 || b.Window >= 1<<(64-windowBits):
		return fmt.Errorf("window %d is no time", b.Window)
	}
	limit, spent := min(b.Limit, math.MaxInt64/2), min(b.Spent, math.MaxInt64/2)
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	id, err := t.findBudget(b.Slot, b.Tenant)
	if err != nil {
		return err
	}
	v := &t.budget.values[id]
	if windowOf(v) != b.Window {
		setWindow(v, b.Window, limit, spent)
		return nil
	}
	// A crash between the two makes less available, never more.
	was := v.Granted
	if limit > was {
		v.Granted = limit
		atomic.AddInt64(&v.Left, int64(limit-was))
	} else if limit < was {
		atomic.AddInt64(&v.Left, -int64(was-limit))
		v.Granted = limit
	}
	return nil
}

// setWindow begins a window. Left goes first: a program that takes from it
// before it sees the window takes what this window has, and its lease is void.
// The other way round it could take what the old window had left.
func setWindow(v *bpf.DatapathBhBudget, start, limit, spent uint64) {
	v.Reserved = 1 // until all is written: loadBudget
	atomic.SwapInt64(&v.Left, int64(limit)-int64(spent))
	v.Granted = limit
	count := (v.Window + 1) & (1<<windowBits - 1)
	atomic.StoreUint64(&v.Window, start<<windowBits|count)
	v.Reserved = 0
}

// windowOf is when the window of a budget began; 0 if it was never set.
func windowOf(v *bpf.DatapathBhBudget) uint64 { return v.Window >> windowBits }

// Budgets reads all budgets that have been set, sorted by tenant and slot: those
// of sandboxes that are attached, and those of tenants, which stay for a while
// when their last sandbox is gone. Spent is exact while nobody sends; otherwise
// it may be too high by what is being leased at that moment.
func (e *Enforcer) Budgets() ([]BudgetState, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	t := &e.limits
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []BudgetState
	for id := range t.budgets.keys {
		v := &t.budget.values[id]
		names, known := t.budgets.name[id]
		if !known || v.Used == 0 || windowOf(v) == 0 {
			continue
		}
		left, err := e.unspent(id)
		if err != nil {
			return nil, fmt.Errorf("read budget of %s: %w", names.tenant, err)
		}
		out = append(out, BudgetState{
			Tenant: names.tenant, Slot: v.Slot, Window: windowOf(v),
			Limit: v.Granted, Spent: uint64(max(int64(v.Granted)-left, 0)),
		})
	}
	slices.SortFunc(out, func(a, b BudgetState) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Slot, b.Slot))
	})
	return out, nil
}

// unspent answers what is left of a budget, leases included.
//
// +checklocks:e.limits.mu
func (e *Enforcer) unspent(id uint32) (int64, error) {
	v := &e.limits.budget.values[id]
	var sum int64
	for range leaseTries {
		before := atomic.LoadInt64(&v.Left)
		var perCPU []bpf.DatapathBhLease
		if err := e.maps["leases"].Lookup(id, &perCPU); err != nil {
			return 0, fmt.Errorf("read leases: %w", err)
		}
		// After the leases: what is leased meanwhile may be missing, but does not
		// count twice.
		sum = atomic.LoadInt64(&v.Left)
		same := sum == before
		for _, l := range perCPU {
			if l.Window == v.Window {
				sum += l.Left
			}
		}
		if same {
			break
		}
	}
	return sum, nil
}
