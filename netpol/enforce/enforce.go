// SPDX-License-Identifier: Apache-2.0

// Package enforce puts compiled policies into the kernel and reads back what
// they did.
//
// It owns the programs of package bpf, their maps, and one pair of TCX links
// for each sandbox, all pinned under PinDir. It never makes or removes network
// devices, and it never decides what a policy means: netpol does.
//
// Kernel 6.6 or later. What is pinned:
//
//	<PinDir>/v1/maps/NAME              all maps
//	<PinDir>/v1/progs/NAME             from_sandbox, to_sandbox, explain
//	<PinDir>/v1/links/<id>/ingress     what the sandbox sends
//	<PinDir>/v1/links/<id>/egress      what it gets
//	<PinDir>/v1/meta                   layout version; pinned last
//
// v1 is the layout version. Everything in it survives the death of the agent:
// verdicts and counters go on, and Open takes it up again, with the names of
// the rules that the counters belong to. If the agent brings another program
// for the same layout, Open swaps it into every link without a gap.
//
// The order of every change is such that a crash leaves a sandbox denied or
// enforced by its old or its new policy, never open: a slot's ifindex is the
// last thing set and the first cleared, a policy is complete before a slot
// points at it, a rule's counter is zero before a policy names it.
//
// Lock order: Enforcer.life, then slot.mu, then one of Enforcer.ids,
// triePool.mu and ruleTable.mu. Enforcer.hostMu is taken under life alone.
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

// rulesPerSandbox is the mean that the table of rule names has room for.
const rulesPerSandbox = 32

// Config is what Open needs to know. MaxSandboxes is fixed while pins exist.
type Config struct {
	PinDir       string         // on a bpffs, or where one may be mounted
	MaxSandboxes uint32         // most slots; 0 is DefaultMaxSandboxes, at most 65535
	Pools        []netip.Prefix // where the addresses of sandboxes come from
	HardDeny     []netip.Prefix // networks of the operator that no policy can open

	policyEntries uint32 // entries a policy may have; 0 is the object's own. For tests
}

// Enforcer is safe for use by many goroutines.
type Enforcer struct {
	cfg  Config
	dir  string // PinDir/v1
	lock *os.File
	spec *ebpf.CollectionSpec
	maps map[string]*ebpf.Map

	fromSandbox, toSandbox, explain *ebpf.Program

	life   sync.RWMutex // written by Close; read by all others for as long as they use maps
	closed bool         // +checklocks:life

	ids   sync.Mutex
	byID  map[string]uint32 // +checklocks:ids; the slot n of every slots[n].id
	slots []slot            // by number; 0 is never used
	shm   sharedSlots

	tries triePool
	rules ruleTable

	hostMu    sync.Mutex
	hostAddrs []netip.Prefix // +checklocks:hostMu; last set by SetHostAddrs
	filter    shared[bpf.DatapathBhDenyFilter]
}

// slot is what the enforcer knows about one sandbox beside what the kernel
// holds.
type slot struct {
	mu     sync.Mutex
	id     string             // +checklocks:mu; "" if the slot is free
	rules  map[ruleKey]uint32 // +checklocks:mu; counter of every rule that the sandbox has had
	digest [32]byte           // +checklocks:mu; of the program in force, if policy is set
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
	if err := probe(); err != nil {
		return nil, err
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

	if err := mountBPF(cfg.PinDir); err != nil {
		return nil, err
	}
	if e.lock, err = lockDir(cfg.PinDir); err != nil {
		return nil, err
	}
	trieSpec, pageSpec := e.size()
	if err := e.openPins(); err != nil {
		return nil, err
	}
	if e.shm.shared, err = mapShared[bpf.DatapathBhSlot](e.maps["slots"], cfg.MaxSandboxes+1); err != nil {
		return nil, err
	}
	if e.filter, err = mapShared[bpf.DatapathBhDenyFilter](e.maps["deny_filter"], 1); err != nil {
		return nil, err
	}
	e.tries = triePool{spec: trieSpec, policies: e.maps["policies"], info: e.maps["policy_info"]}
	e.rules = ruleTable{spec: pageSpec, pages: e.maps["rule_counters"], names: e.maps["rule_names"]}
	if err := e.recover(); err != nil {
		return nil, fmt.Errorf("recover %s: %w", e.dir, err)
	}
	if err := e.setHardDeny(e.hostAddrs); err != nil {
		return nil, err
	}
	if err := e.tries.prefill(); err != nil {
		return nil, err
	}
	return e, nil
}

// size sets the sizes of maps that depend on the configuration, and takes
// out the maps that are only patterns for others.
func (e *Enforcer) size() (trie, page *ebpf.MapSpec) {
	n := e.cfg.MaxSandboxes
	m := e.spec.Maps
	m["links"].MaxEntries = n
	m["slots"].MaxEntries = n + 1
	m["counters"].MaxEntries = n + 1
	m["drops"].MaxEntries = n + 1
	// One in force and one being loaded for each, and index 0.
	m["policies"].MaxEntries = 2*n + 1
	m["policy_info"].MaxEntries = 2*n + 1
	m["rule_names"].MaxEntries = max(n*rulesPerSandbox, rulesPerPage)
	trie, page = m["policy_template"].Copy(), m["rule_page_template"].Copy()
	delete(m, "policy_template")
	delete(m, "rule_page_template")
	if e.cfg.policyEntries != 0 {
		trie.MaxEntries = e.cfg.policyEntries
	}
	return trie, page
}

// recover reads from the maps what an earlier process knew.
func (e *Enforcer) recover() error {
	names, err := e.rules.load()
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
		}
	}
	// What is left belongs to sandboxes that were being detached.
	for _, left := range names {
		if err := e.rules.release(left); err != nil {
			return err
		}
	}
	e.tries.init(2*e.cfg.MaxSandboxes, inUse)
	return e.readHostAddrs()
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
	errs = append(errs, e.shm.close(), e.filter.close(), e.tries.close(), e.rules.close())
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
