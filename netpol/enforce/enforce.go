// SPDX-License-Identifier: Apache-2.0

// Package enforce puts compiled policies into the kernel and reads back what
// they did.
//
// It owns the programs of package bpf, their maps, and the two places on each
// sandbox's link where they run, all pinned under PinDir. It never makes or
// removes network devices, and it never decides what a policy means: netpol
// does.
//
// What is pinned:
//
//	<PinDir>/v2/maps/NAME              all maps
//	<PinDir>/v2/progs/NAME             from_sandbox, to_sandbox, explain
//	<PinDir>/v2/links/<id>/ingress     what the sandbox sends
//	<PinDir>/v2/links/<id>/egress      what it gets
//	<PinDir>/v2/meta                   layout version; pinned last
//
// The two pins of a sandbox are links, or, where the kernel has no TCX, the
// programs of its filters, with _IFINDEX behind the name.
//
// v2 is the layout version. Everything in it survives the death of the agent:
// verdicts and counters go on, and Open takes it up again, with the names of
// the rules that the counters belong to. If the agent brings another program
// for the same layout, Open swaps it into every link without a gap.
//
// The order of every change is such that a crash leaves a sandbox denied or
// enforced by its old or its new policy, never open: a slot's ifindex is the
// last thing set and the first cleared, a policy is complete before a slot
// points at it, a rule's counter is zero before a policy names it, and nothing
// that a program may still look at is used for something else.
//
// Lock order: Enforcer.life, then slot.mu, then policyPool.making, then one of
// Enforcer.ids, policyPool.mu, ruleTable.mu, limitTable.mu and generations.mu.
// Enforcer.hostMu is taken under life alone.
package enforce

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// Sentinels.
var (
	ErrNotFound    = errors.New("no such sandbox")         // the slot or id is not attached
	ErrNotEnforced = errors.New("not enforced")            // Verify: the kernel does something else
	ErrSlotTaken   = errors.New("slot is taken")           // Attach: by another id
	ErrLayout      = errors.New("pins of another layout")  // Open: made by another version or with other sizes
	ErrLocked      = errors.New("pins are in use")         // Open: by another process
	ErrUnsupported = errors.New("kernel is not supported") // Open: the text says what is missing
	ErrClosed      = errors.New("enforcer is closed")
)

// DefaultMaxSandboxes is used when Config says 0.
const DefaultMaxSandboxes = 4096

// rulesPerSandbox is how many counters of rules every sandbox can have. The table
// of rule names has room for twice as many: the rest is for who comes first.
const rulesPerSandbox = 32

// Config is what Open needs to know. MaxSandboxes is fixed while pins exist.
type Config struct {
	PinDir       string         // on a bpffs, or where one may be mounted
	MaxSandboxes uint32         // most slots; 0 is DefaultMaxSandboxes, at most 65535
	Pools        []netip.Prefix // where the addresses of sandboxes come from
	HardDeny     []netip.Prefix // networks of the operator that no policy can open

	policyEntries uint32 // entries a policy may have; 0 is the object's own. For tests
	forceClsact   bool   // as on a kernel without TCX. For tests
}

// Enforcer is safe for use by many goroutines.
type Enforcer struct {
	cfg  Config
	dir  string // PinDir/v2
	lock *os.File
	spec *ebpf.CollectionSpec
	maps map[string]*ebpf.Map

	fromSandbox, toSandbox, explain *ebpf.Program
	hooking                         hooking

	life   sync.RWMutex // written by Close; read by all others for as long as they use maps
	closed bool         // +checklocks:life

	ids   sync.Mutex
	byID  map[string]uint32 // +checklocks:ids; the slot n of every slots[n].id
	slots []slot            // by number; 0 is never used
	shm   sharedSlots

	pool        policyPool
	rules       ruleTable
	limits      limitTable
	generations generations
	ticker      ticker

	hostMu    sync.Mutex
	hostAddrs []netip.Prefix // +checklocks:hostMu; last set by SetHostAddrs
	filter    shared[bpf.DatapathBhDenyFilter]
	state     shared[bpf.DatapathBhState]
}

// slot is what the enforcer knows about one sandbox beside what the kernel
// holds.
type slot struct {
	mu     sync.Mutex
	id     string             // +checklocks:mu; "" if the slot is free
	rules  map[ruleKey]uint32 // +checklocks:mu; counter of every rule that the sandbox has had
	digest [32]byte           // +checklocks:mu; of the program in force, if policy is set

	// What translates the rule ids of the program in force. byID is nil if an
	// earlier process made it the policy and nobody has named it since.
	byID    []uint32  // +checklocks:mu; counter by rule id
	limits  limitIDs  // +checklocks:mu
	learned *ebpf.Map // +checklocks:mu; table of learned addresses of the policy; nil if there is no policy
}

// Open loads the datapath or takes up what an earlier process left. It mounts
// a bpffs on PinDir if there is none. Errors: ErrUnsupported, ErrLayout,
// ErrLocked.
func Open(cfg Config) (_ *Enforcer, err error) {
	if cfg.MaxSandboxes == 0 {
		cfg.MaxSandboxes = DefaultMaxSandboxes
	}
	if cfg.MaxSandboxes > 65535 {
		return nil, fmt.Errorf("open %s: at most 65535 sandboxes, not %d", cfg.PinDir, cfg.MaxSandboxes)
	}
	if !filepath.IsAbs(cfg.PinDir) {
		return nil, fmt.Errorf("open %q: pin directory is not an absolute path", cfg.PinDir)
	}
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read datapath object: %w", err)
	}
	e := &Enforcer{cfg: cfg, spec: spec, maps: map[string]*ebpf.Map{}, byID: map[string]uint32{}}
	e.dir = filepath.Join(cfg.PinDir, layoutDir)
	e.slots = make([]slot, cfg.MaxSandboxes+1)
	defer func() {
		if err != nil {
			err = errors.Join(err, e.release())
		}
	}()

	if e.hooking, err = e.newHooking(); err != nil {
		return nil, err
	}
	if err := mountBPF(cfg.PinDir); err != nil {
		return nil, err
	}
	if e.lock, err = lockDir(cfg.PinDir); err != nil {
		return nil, err
	}
	e.size()
	if err := e.openPins(); err != nil {
		return nil, err
	}
	if e.shm.shared, err = mapShared[bpf.DatapathBhSlot](e.maps["slots"], cfg.MaxSandboxes+1); err != nil {
		return nil, err
	}
	if e.filter, err = mapShared[bpf.DatapathBhDenyFilter](e.maps["deny_filter"], 1); err != nil {
		return nil, err
	}
	if e.state, err = mapShared[bpf.DatapathBhState](e.maps["state"], 1); err != nil {
		return nil, err
	}
	e.pool.policies, e.pool.learned, e.pool.info = e.maps["policies"], e.maps["learned"], e.maps["policy_info"]
	e.pool.reaped = e.reuse
	e.rules.pages, e.rules.names = e.maps["rule_counters"], e.maps["rule_names"]
	if err := e.recover(); err != nil {
		return nil, fmt.Errorf("recover %s: %w", e.dir, err)
	}
	if err := e.setHardDeny(e.hostAddrs); err != nil {
		return nil, err
	}
	if err := e.ticker.start(&e.state); err != nil {
		return nil, err
	}
	return e, nil
}

// size sets the sizes of maps that depend on the configuration, and takes
// out the maps that are only patterns for others.
func (e *Enforcer) size() {
	n := e.cfg.MaxSandboxes
	m := e.spec.Maps
	m["links"].MaxEntries = n
	for _, name := range []string{"slots", "counters", "drops", "echoes"} {
		m[name].MaxEntries = n + 1
	}
	// One in force and one being loaded for each, and index 0.
	for _, name := range []string{"policies", "policy_info", "learned", "heads"} {
		m[name].MaxEntries = 2*n + 1
	}
	// All that any sandbox may have, in force and being loaded: no tenant's
	// rates must be in the way of another's policy.
	m["rates"].MaxEntries = 2*(netpol.MaxRated+netpol.MaxLevels)*n + 1
	m["budgets"].MaxEntries = 2*n + 1
	m["leases"].MaxEntries = 2*n + 1
	m["rule_names"].MaxEntries = max(2*n*rulesPerSandbox, rulesPerPage)
	take := func(name string) *ebpf.MapSpec {
		spec := m[name].Copy()
		delete(m, name)
		return spec
	}
	e.pool.trieSpec, e.pool.learnedSpec = take("policy_template"), take("learned_template")
	e.rules.spec = take("rule_page_template")
	if e.cfg.policyEntries != 0 {
		e.pool.trieSpec.MaxEntries = e.cfg.policyEntries
	}
}

// recover reads from the maps what an earlier process knew.
func (e *Enforcer) recover() error {
	names, err := e.rules.load(int(e.cfg.MaxSandboxes))
	if err != nil {
		return err
	}
	inUse := map[uint32]bool{}
	for n := uint32(1); n <= e.cfg.MaxSandboxes; n++ {
		id := e.shm.id(n)
		if id == "" {
			continue
		}
		s := &e.slots[n]
		s.id = id
		s.rules = map[ruleKey]uint32{}
		maps.Copy(s.rules, names[n])
		delete(names, n)
		e.byID[id] = n
		if policy := e.shm.policy(n); policy != 0 {
			inUse[policy] = true
			var info bpf.DatapathBhPolicyInfo
			if err := e.maps["policy_info"].Lookup(policy, &info); err != nil {
				return fmt.Errorf("read policy %d: %w", policy, err)
			}
			s.digest = info.Digest
			if s.learned, err = e.pool.learnedOf(policy); err != nil {
				return err
			}
		}
	}
	// What is left belongs to sandboxes that were being detached.
	for _, left := range names {
		if err := e.rules.release(left); err != nil {
			return err
		}
	}
	if err := e.loadLimits(); err != nil {
		return err
	}
	if err := e.readHostAddrs(); err != nil {
		return err
	}
	return e.pool.init(2*e.cfg.MaxSandboxes, inUse)
}

// reuse lets what only a retired policy has used be used again.
func (e *Enforcer) reuse(r retired) {
	e.rules.recycle(r.counters)
	e.releaseLimits(r.limits)
}

// Close gives up the maps and programs of this process. Everything that is
// pinned stays, and sandboxes stay enforced.
func (e *Enforcer) Close() error {
	e.life.Lock()
	defer e.life.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	return e.release()
}

func (e *Enforcer) release() error {
	var errs []error
	e.ticker.close()
	errs = append(errs, e.pool.close(), e.rules.close(), e.closeLimits())
	errs = append(errs, e.shm.close(), e.filter.close(), e.state.close())
	for n := range e.slots {
		if m := e.slots[n].learned; m != nil {
			errs = append(errs, m.Close())
		}
	}
	for _, m := range e.maps {
		errs = append(errs, m.Close())
	}
	for _, p := range []*ebpf.Program{e.fromSandbox, e.toSandbox, e.explain} {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	if e.lock != nil {
		errs = append(errs, e.lock.Close())
	}
	return errors.Join(errs...)
}

// Purge detaches every sandbox, removes all pins and closes the enforcer. The
// bpffs stays mounted.
func (e *Enforcer) Purge() error {
	ids, err := e.List()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := e.Detach(id, 0); err != nil {
			return err
		}
	}
	if err := e.use(); err != nil {
		return err
	}
	err = os.RemoveAll(e.dir)
	e.life.RUnlock()
	return errors.Join(err, e.Close())
}

// use keeps the maps open until life.RUnlock.
func (e *Enforcer) use() error {
	e.life.RLock()
	if e.closed {
		e.life.RUnlock()
		return ErrClosed
	}
	return nil
}
