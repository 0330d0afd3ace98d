// SPDX-License-Identifier: Apache-2.0

// Package budget keeps the byte budgets of policies: it says when their windows
// begin, gives the kernel each budget before a policy that names it is in
// force, begins every window anew when it is due, and writes down what was
// spent. It counts nothing itself: the egress program does.
//
// A budget belongs to a tenant, and then to all sandboxes of it and below it on
// this node, or to one sandbox. Its windows are hours, days and months of UTC.
//
// What survives: while the kernel lives, everything, since what is spent is
// counted in pinned maps; kill -9 of the agent forgets nothing. After a reboot
// what the store has counts, which is at most Config.Every old: at most so much
// of the spending is forgotten. A window that is over while no agent runs is
// begun anew when the next one starts; until then what was left of it holds.
//
// A window never begins before one that has been. With a clock that jumps back,
// a spent budget stays spent until the clock has passed the window's end again;
// Warn says so meanwhile.
//
// Lock order: Keeper.mu alone; it is held while the kernel and the store are
// called.
package budget

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// State is a budget as the kernel has it. Window is when it began, in seconds
// since 1970; 0 if it was never given one. Limit and Spent are bytes.
type State struct {
	Tenant string
	Slot   uint32 // 0: of the tenant
	Window uint64
	Limit  uint64
	Spent  uint64 // given to the kernel, it counts only if the kernel does not have the window yet
}

// Entry is what the store keeps of one budget: bytes spent in the window that
// began at Window.
type Entry struct {
	Window uint64 `json:"window"`
	Spent  uint64 `json:"spent"`
}

// Kernel enforces budgets.
type Kernel interface {
	SetBudget(s State) error
	Budgets() ([]State, error)
}

// Store keeps entries by key, over a reboot.
type Store interface {
	Budgets() (map[string]Entry, error)
	PutBudgets(put map[string]Entry, drop []string) error // in one transaction
}

// Config of a Keeper. All fields are required unless they say otherwise.
type Config struct {
	Kernel Kernel
	Store  Store
	Log    *slog.Logger
	Warn   func(text string) // a standing warning, or "" when there is none; optional
	Every  time.Duration     // between writes of what was spent; 0: 10 s
	Now    func() time.Time  // optional; for tests of clocks that jump
}

// Keeper is safe for use by many goroutines.
type Keeper struct {
	cfg Config

	mu     sync.Mutex
	saved  map[string]Entry   // +checklocks:mu; what the store has
	found  map[place]Entry    // +checklocks:mu; what the kernel had at New
	active map[owner]*current // +checklocks:mu; named by a program since New
}

// owner of a budget: a tenant, or one sandbox under that tenant's policy.
type owner struct{ id, tenant string }

// place is where the kernel has a budget.
type place struct {
	tenant string
	slot   uint32
}

// current is a budget that some program names.
type current struct {
	Entry
	slot  uint32
	per   netpol.Window
	limit uint64
}

// key of an owner in the store. Ids have no '/'.
func (o owner) key() string {
	if o.id == "" {
		return "tenant/" + o.tenant
	}
	return "sandbox/" + o.id + "/" + o.tenant
}

// New makes a Keeper from what the store and the kernel know.
func New(cfg Config) (*Keeper, error) {
	if cfg.Every == 0 {
		cfg.Every = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Warn == nil {
		cfg.Warn = func(string) {}
	}
	k := &Keeper{cfg: cfg, found: map[place]Entry{}, active: map[owner]*current{}}
	var err error
	if k.saved, err = cfg.Store.Budgets(); err != nil {
		return nil, err
	}
	states, err := cfg.Kernel.Budgets()
	if err != nil {
		return nil, fmt.Errorf("read budgets: %w", err)
	}
	for _, s := range states {
		k.found[place{s.Tenant, s.Slot}] = Entry{Window: s.Window, Spent: s.Spent}
	}
	return k, nil
}

// Ensure gives the kernel every budget that p names. It is called before p is
// put in force for sandbox id, since a budget that the kernel does not have is
// a spent one.
func (k *Keeper) Ensure(id string, slot uint32, p netpol.Program) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for o, b := range budgetsOf(id, p) {
		c := current{per: b.Per, limit: b.Bytes, Entry: k.known(o, slot)}
		if o.id != "" {
			c.slot = slot
		}
		c.advance(k.cfg.Now())
		if err := k.set(o, c); err != nil {
			return err
		}
		k.active[o] = &c
	}
	return nil
}

// budgetsOf answers the budgets that a program names by owner. Of two with one
// owner the smaller holds.
func budgetsOf(id string, p netpol.Program) map[owner]netpol.ProgramBudget {
	out := map[owner]netpol.ProgramBudget{}
	for _, b := range p.Budgets {
		o := owner{tenant: b.Tenant}
		if b.Scope == netpol.ScopeSandbox {
			o.id = id
		}
		if have, ok := out[o]; !ok || b.Bytes < have.Bytes {
			out[o] = b
		}
	}
	return out
}

// known answers the latest that is known of a budget. The caller holds mu.
func (k *Keeper) known(o owner, slot uint32) Entry {
	if c := k.active[o]; c != nil {
		return c.Entry
	}
	if o.id == "" {
		slot = 0
	}
	return later(k.saved[o.key()], k.found[place{o.tenant, slot}])
}

// later answers the one of the later window; of one window, what is more spent.
func later(a, b Entry) Entry {
	if a.Window > b.Window || a.Window == b.Window && a.Spent > b.Spent {
		return a
	}
	return b
}

// advance begins the window that now lies in, if it is later than the one that
// has been, and reports whether it did.
func (c *current) advance(now time.Time) bool {
	start := Start(c.per, now)
	if start <= c.Window {
		return false
	}
	c.Entry = Entry{Window: start}
	return true
}

func (k *Keeper) set(o owner, c current) error {
	err := k.cfg.Kernel.SetBudget(State{Tenant: o.tenant, Slot: c.slot, Window: c.Window, Limit: c.limit, Spent: c.Spent})
	if err != nil {
		return fmt.Errorf("set budget of %s: %w", o, err)
	}
	return nil
}

func (o owner) String() string {
	if o.id == "" {
		return "tenant " + o.tenant
	}
	return fmt.Sprintf("sandbox %s under the policy of %s", o.id, o.tenant)
}

// Release writes down what was spent and forgets the budgets of one sandbox,
// those that the kernel has for its slot included. It is called when nothing of
// the sandbox runs any more and before the kernel forgets it. It may be
// repeated.
func (k *Keeper) Release(id string, slot uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.save(id); err != nil {
		return err
	}
	maps.DeleteFunc(k.active, func(o owner, _ *current) bool { return o.id == id })
	maps.DeleteFunc(k.found, func(p place, _ Entry) bool { return p.slot == slot && slot != 0 })
	return nil
}

// Run begins windows anew and writes down what was spent until ctx ends, and
// once more then.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for left := k.cfg.Every; ; {
		select {
		case <-tick.C:
			left -= time.Second
			save := left <= 0
			if save {
				left = k.cfg.Every
			}
			k.cfg.Warn(k.turn(save))
		case <-ctx.Done():
			k.last()
			return nil
		}
	}
}

// last writes down what was spent. It is too late to do more than to say so if
// that fails; the kernel goes on counting, and the next agent reads it there.
func (k *Keeper) last() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.save(""); err != nil {
		k.cfg.Log.Error("record what was spent of budgets", "err", err)
	}
}

// turn is one second's work. It answers what an operator should know.
func (k *Keeper) turn(save bool) (warning string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var wrong []string
	rolled, err := k.roll()
	if err != nil {
		k.cfg.Log.Error("begin a budget anew; what was left of it holds", "err", err)
		wrong = append(wrong, fmt.Sprintf("a budget cannot be begun anew: %v", err))
	}
	if save || rolled {
		if err := k.save(""); err != nil {
			k.cfg.Log.Error("record what was spent of budgets; the kernel keeps counting", "err", err)
			wrong = append(wrong, fmt.Sprintf("what was spent of budgets cannot be recorded, a reboot would forget it: %v", err))
		}
	}
	now := uint64(max(k.cfg.Now().Unix(), 0))
	for o, c := range k.active {
		if c.Window > now {
			wrong = append(wrong, fmt.Sprintf("the clock is behind the budget of %s, which began at %s: it is not begun anew before %s",
				o, time.Unix(int64(c.Window), 0).UTC().Format(time.RFC3339), End(c.per, c.Window).Format(time.RFC3339)))
			break
		}
	}
	return strings.Join(wrong, "; ")
}

// roll begins every window that is due. The caller holds mu.
func (k *Keeper) roll() (any bool, err error) {
	now := k.cfg.Now()
	var errs []error
	for o, c := range k.active {
		next := *c
		if !next.advance(now) {
			continue
		}
		if err := k.set(o, next); err != nil {
			errs = append(errs, err)
			continue
		}
		*c, any = next, true
	}
	return any, errors.Join(errs...)
}

// save writes what has changed since the store was last told, and takes out
// what sandbox drop has. The caller holds mu.
func (k *Keeper) save(drop string) error {
	states, err := k.cfg.Kernel.Budgets()
	if err != nil {
		return fmt.Errorf("read budgets: %w", err)
	}
	spent := map[place]Entry{}
	for _, s := range states {
		spent[place{s.Tenant, s.Slot}] = Entry{Window: s.Window, Spent: s.Spent}
	}
	put := map[string]Entry{}
	for _, s := range states { // a tenant's may be known to no program of ours: the kernel forgets it with its last sandbox
		o := owner{tenant: s.Tenant}
		if e := later(k.saved[o.key()], spent[place{s.Tenant, 0}]); s.Slot == 0 && k.active[o] == nil && e != k.saved[o.key()] {
			put[o.key()] = e
		}
	}
	for o, c := range k.active {
		if now, ok := spent[place{o.tenant, c.slot}]; ok && now.Window == c.Window {
			c.Entry = later(c.Entry, now)
		}
		if o.id == drop && drop != "" || k.saved[o.key()] == c.Entry {
			continue
		}
		put[o.key()] = c.Entry
	}
	gone := k.keysOf(drop)
	if len(put) == 0 && len(gone) == 0 {
		return nil
	}
	if err := k.cfg.Store.PutBudgets(put, gone); err != nil {
		return err
	}
	maps.Copy(k.saved, put)
	for _, key := range gone {
		delete(k.saved, key)
	}
	return nil
}

// keysOf answers what the store has of a sandbox. The caller holds mu.
func (k *Keeper) keysOf(id string) (keys []string) {
	if id == "" {
		return nil
	}
	for key := range k.saved {
		if strings.HasPrefix(key, "sandbox/"+id+"/") {
			keys = append(keys, key)
		}
	}
	return keys
}
