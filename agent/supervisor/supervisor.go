// SPDX-License-Identifier: Apache-2.0

// Package supervisor owns every sandbox of the node: one goroutine for each,
// a list of launch steps with undo, adoption after a restart, and the last
// word on usage.
//
// A sandbox goes through these steps; those of one wave run side by side:
//
//	wave  step     do                                     undo
//	0     cgroup   tenant nodes with their limits         remove the leaf
//	0     link     netns, veth, addresses, link down,     remove all of it
//	               published ports
//	1     egress   budgets, policy, attach, read back     budgets to disk, detach,
//	                                                      forget counters
//	1     task     snapshot, container, held init         remove all of it
//	2     names    resolver inside the netns              close it, forget what it learned
//	3     start    verify egress, link up, Running to     kill, wait until the cgroup is
//	               disk, let the command run              empty, link down, last usage sample
//
// Undo runs from the last wave to the first and again until it works: a
// sandbox is Stopped only when nothing of it is left and its usage is in the
// spool. Every do and every undo may be repeated.
//
// What survives a crash of the agent: the sandboxes themselves, their
// enforcement and their counters (all in the kernel and in containerd's
// shims), the store's records and the meter's marks. Run adopts what it finds.
// It destroys only what a record of ours says is ours and finished.
//
// Lock order: Supervisor.admission, then Supervisor.metering, then box.repair,
// then Supervisor.mu, then box.mu, then Supervisor.watching. A change of policy
// holds many boxes, every repair before any mu; admission says that no other
// does. Names, Budgets and Egress are called under these locks and must not call
// back.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// ErrNotFound says: no sandbox answers to that reference.
var ErrNotFound = errors.New("no such sandbox")

// ErrAmbiguous says: several sandboxes answer to that reference.
var ErrAmbiguous = errors.New("several sandboxes answer to it")

// ErrNotStopped says: it must be stopped first.
var ErrNotStopped = errors.New("is not stopped")

// ErrNoResolver says: names do not resolve in the sandbox, and it is tried
// again; what they have taught before is in force.
var ErrNoResolver = errors.New("names do not resolve")

// ErrLeaving says: the agent is on its way out and starts nothing.
var ErrLeaving = errors.New("the agent is stopping")

// Supervisor of all sandboxes of a node.
type Supervisor struct {
	cfg     Config
	tenants atomic.Pointer[tenant.Set]
	leaving atomic.Bool

	admission sync.Mutex // one decision at a time
	metering  sync.Mutex // one usage batch at a time; guards marks and settled
	marks     map[string]meter.Mark
	settled   bool // every mark's pending records are in the spool

	mu       sync.Mutex
	boxes    map[string]*box   // +checklocks:mu
	warnings map[string]string // +checklocks:mu
	group    *errgroup.Group
	runCtx   context.Context

	watching sync.Mutex
	subs     map[*Subscription]struct{} // +checklocks:watching
}

// New makes a Supervisor from what the store knows. Nothing runs before Run.
func New(cfg Config) (*Supervisor, error) {
	s := &Supervisor{
		cfg:      cfg,
		boxes:    map[string]*box{},
		subs:     map[*Subscription]struct{}{},
		warnings: map[string]string{},
	}
	if cfg.Names == nil {
		s.cfg.Names = noNames{}
	}
	s.tenants.Store(cfg.Tenants)
	recs, err := cfg.Store.Load()
	if err != nil {
		return nil, err
	}
	if s.marks, err = cfg.Store.Marks(); err != nil {
		return nil, err
	}
	for _, rec := range recs {
		b := newBox(s, rec)
		if prog, err := compile(cfg.Tenants, rec.Spec); err == nil && rec.State.Live() && prog.Digest == rec.PolicyDigest {
			b.program = prog // else adopt gives it what its tenant has today
		}
		s.boxes[rec.ID] = b
	}
	return s, nil
}

// Run adopts what was there before, meters and verifies until ctx ends, and
// returns when every goroutine of a sandbox has let go of it. Sandboxes run on.
// ready is closed when Create may be called.
func (s *Supervisor) Run(ctx context.Context, ready chan<- struct{}) error {
	group, ctx := errgroup.WithContext(ctx)
	s.mu.Lock()
	s.group, s.runCtx = group, ctx
	var adopt, stopped []*box
	for _, b := range s.boxes {
		if b.record().State.Live() {
			adopt = append(adopt, b)
		} else {
			stopped = append(stopped, b)
		}
	}
	s.mu.Unlock()
	s.sweep(ctx)
	if err := s.limit(s.Tenants()); err != nil { // they may have changed while no agent ran
		s.cfg.Log.Error("limit tenants", "err", err)
		s.warn("limits", fmt.Sprintf("tenants' cgroups do not have the limits of their files: %v", err))
	}
	for _, b := range stopped {
		group.Go(func() error { b.finish(ctx); return nil })
	}
	for _, b := range adopt {
		group.Go(func() error { b.run(ctx, b.adopt); return nil })
	}
	group.Go(func() error { s.meterLoop(ctx); return nil })
	group.Go(func() error { s.verifyLoop(ctx); return nil })
	close(ready)
	<-ctx.Done()
	s.leaving.Store(true)
	return group.Wait()
}

// Create admits spec for whoever by names and starts its launch. The answer
// comes when the decision is on disk; Launched waits for the rest. Errors:
// *sandbox.SpecError, *admit.Denied, runtime.ErrImageNotFound, netpol errors,
// the store's ErrNameTaken.
func (s *Supervisor) Create(ctx context.Context, spec sandbox.Spec, by string) (sandbox.Record, error) {
	if s.leaving.Load() {
		return sandbox.Record{}, ErrLeaving
	}
	id := sandbox.NewID()
	if spec.Name == "" {
		spec.Name = "sb-" + id
	}
	if err := spec.Check(); err != nil {
		return sandbox.Record{}, err
	}
	limits, err := spec.Limits.Resolve(s.cfg.Defaults, s.cfg.Biggest)
	if err != nil {
		return sandbox.Record{}, err
	}
	spec.Limits = limits
	set := s.tenants.Load()
	claim := claimOf(spec)
	if d := admit.Decide(set, s.node(), s.claims(), claim); d != nil {
		return sandbox.Record{}, d // refused before the image is looked up, and once more below
	}
	prog, err := compile(set, spec)
	if err == nil {
		err = s.resolvable(prog)
	}
	if err != nil {
		return sandbox.Record{}, err
	}
	img, err := s.cfg.Runtime.Image(ctx, spec.Image)
	if err != nil {
		return sandbox.Record{}, err
	}
	rec := sandbox.Record{
		ID: id, Spec: spec, State: sandbox.Admitted, CreatedBy: by, Created: time.Now().UTC(),
		ImageDigest: img.Digest, PolicyRev: 1, BootID: s.cfg.BootID, NotEnforced: s.cfg.NotEnforced,
	}
	rec.Log(rec.Created, "created", "by %s, image %s", by, img.Digest)
	b, err := s.reserve(rec, claim)
	if err != nil {
		return sandbox.Record{}, err
	}
	s.mu.Lock()
	group, runCtx := s.group, s.runCtx
	s.mu.Unlock()
	group.Go(func() error { b.run(runCtx, b.launch); return nil })
	return b.record(), nil
}

// reserve decides once more, now alone and by the tenants that are in force
// now, and puts decision, reservation and intent on disk in one transaction.
func (s *Supervisor) reserve(rec sandbox.Record, claim admit.Claim) (*box, error) {
	s.admission.Lock()
	defer s.admission.Unlock()
	set := s.tenants.Load()
	if d := admit.Decide(set, s.node(), s.claims(), claim); d != nil {
		return nil, d
	}
	prog, err := compile(set, rec.Spec)
	if err == nil {
		err = s.resolvable(prog)
	}
	if err != nil {
		return nil, err
	}
	rec.PolicyDigest = prog.Digest
	// Something that no record knows of may hold a slot, and with it an address.
	taken, err := s.cfg.Egress.Slots()
	if err != nil {
		return nil, err
	}
	if rec, err = s.cfg.Store.Reserve(rec, s.cfg.MaxSlot, taken); err != nil {
		return nil, err
	}
	b := newBox(s, rec)
	b.program = prog
	s.mu.Lock()
	s.boxes[rec.ID] = b
	s.mu.Unlock()
	s.publish(rec, false)
	return b, nil
}

func (s *Supervisor) node() admit.Node {
	n := admit.Node{Capacity: s.cfg.Capacity, PublishPorts: s.cfg.PublishPorts, Listens: s.cfg.HostListens}
	if s.cfg.SpoolFull != nil {
		n.SpoolFull = s.cfg.SpoolFull()
	}
	return n
}

// claims answers what every live sandbox holds.
func (s *Supervisor) claims() []admit.Claim {
	s.mu.Lock()
	defer s.mu.Unlock()
	claims := make([]admit.Claim, 0, len(s.boxes))
	for _, b := range s.boxes {
		if rec := b.record(); rec.State.Live() {
			claims = append(claims, claimOf(rec.Spec))
		}
	}
	return claims
}

func claimOf(spec sandbox.Spec) admit.Claim {
	return admit.Claim{Tenant: spec.Tenant, Name: spec.Name, Limits: spec.Limits, Publish: spec.Publish}
}

// Launched returns when the command of a sandbox has started, or with the
// record of how its launch failed.
func (s *Supervisor) Launched(ctx context.Context, id string) (sandbox.Record, error) {
	b, err := s.box(id)
	if err != nil {
		return sandbox.Record{}, err
	}
	select {
	case <-b.launched:
		b.mu.Lock()
		rec, failed := b.rec.Clone(), b.launchErr
		b.mu.Unlock()
		switch {
		case rec.State != sandbox.Admitted && rec.State != sandbox.Placed:
			return rec, nil
		case failed != nil: // the disk does not even take the record of it
			return sandbox.Record{}, fmt.Errorf("sandbox %s (%s) did not start: %w", rec.Spec.Name, rec.ID, failed)
		}
		return sandbox.Record{}, ErrLeaving // the next agent undoes what there is
	case <-ctx.Done():
		return sandbox.Record{}, ctx.Err()
	}
}

// Wait returns the record of a sandbox once it is Stopped.
func (s *Supervisor) Wait(ctx context.Context, id string) (sandbox.Record, error) {
	b, err := s.box(id)
	if err != nil {
		return sandbox.Record{}, err
	}
	release := b.hold()
	defer release()
	select {
	case <-b.stopped:
		return b.record(), nil
	case <-ctx.Done():
		return sandbox.Record{}, ctx.Err()
	case <-s.runCtx.Done():
		return sandbox.Record{}, ErrLeaving
	}
}

// Hold keeps an auto-remove sandbox's record and log until release is called.
func (s *Supervisor) Hold(id string) (release func(), err error) {
	b, err := s.box(id)
	if err != nil {
		return nil, err
	}
	return b.hold(), nil
}

// Stop asks a sandbox to end and returns at once; the first request is the one
// that its exit record names. It is no error if it has ended already.
func (s *Supervisor) Stop(id string, req sandbox.StopRequest) error {
	b, err := s.box(id)
	if err != nil {
		return err
	}
	if req.Grace == 0 {
		req.Grace = s.cfg.Grace
	}
	req.Grace = max(req.Grace, 0)
	req.At = time.Now().UTC()
	return b.requestStop(req)
}

// Delete forgets a stopped sandbox, its log included.
func (s *Supervisor) Delete(id string) error {
	b, err := s.box(id)
	if err != nil {
		return err
	}
	rec := b.record()
	if rec.State.Live() {
		return fmt.Errorf("sandbox %s %w: it is %s", rec.Spec.Name, ErrNotStopped, rec.State)
	}
	// The log first: nothing would lead to it once the record is gone.
	if err := s.cfg.RemoveLog(id); err != nil {
		return fmt.Errorf("remove log of sandbox %s: %w", id, err)
	}
	if err := s.cfg.Store.Delete(id); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.boxes, id)
	s.mu.Unlock()
	s.metering.Lock()
	delete(s.marks, id)
	s.metering.Unlock()
	s.publish(rec, true)
	return nil
}

// forgetOldest deletes the oldest stopped sandboxes of a tenant beyond those
// that are kept, so that no tenant fills the disk with what it has run. One
// that a client still reads from stays until the next time.
func (s *Supervisor) forgetOldest(path tenant.Path) {
	var stopped []sandbox.Record
	for _, rec := range s.List() {
		if rec.State == sandbox.Stopped && rec.Spec.Tenant == path {
			stopped = append(stopped, rec)
		}
	}
	for i := 0; i < len(stopped)-s.cfg.KeepStopped; i++ {
		b, err := s.box(stopped[i].ID)
		if err != nil || b.held() {
			continue
		}
		if err := s.Delete(b.id); err != nil && !errors.Is(err, ErrNotFound) {
			s.cfg.Log.Warn("forget the oldest stopped sandbox", "sandbox", b.id, "err", err)
		}
	}
}

// adoptionWait is how long a caller waits for a sandbox that a restarted agent
// is about to take over.
const adoptionWait = 10 * time.Second

// Task answers the running task of a sandbox, for exec and attach. If the agent
// has just been restarted it waits until the sandbox is its own again.
func (s *Supervisor) Task(ctx context.Context, id string) (runtime.Task, error) {
	b, err := s.box(id)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	adopting := b.task == nil && b.rec.State == sandbox.Running
	b.mu.Unlock()
	if adopting {
		timer := time.NewTimer(adoptionWait)
		defer timer.Stop()
		select {
		case <-b.launched:
		case <-timer.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return b.running()
}

// running answers the task, if there is one that runs.
func (b *box) running() (runtime.Task, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.task == nil || b.rec.State != sandbox.Running {
		return nil, fmt.Errorf("sandbox %s is %s: %w", b.rec.Spec.Name, b.rec.State, runtime.ErrNotRunning)
	}
	return b.task, nil
}

// PID answers the host's pid of a sandbox's command, 0 if there is none.
func (s *Supervisor) PID(id string) uint32 {
	b, err := s.box(id)
	if err != nil {
		return 0
	}
	t, err := b.running()
	if err != nil {
		return 0
	}
	return t.PID()
}

// Program answers the policy in force for a sandbox.
func (s *Supervisor) Program(id string) (netpol.Program, error) {
	b, err := s.box(id)
	if err != nil {
		return netpol.Program{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.program, nil
}

// Live reports whether a sandbox of that id is not stopped yet.
func (s *Supervisor) Live(id string) bool {
	b, err := s.box(id)
	return err == nil && b.record().State.Live()
}

// Enforced answers when the egress of a sandbox was last found to be enforced,
// the zero time if not yet, and why it is cut off now, if it is.
func (s *Supervisor) Enforced(id string) (verified time.Time, degraded string) {
	b, err := s.box(id)
	if err != nil {
		return time.Time{}, ""
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.verified, b.degraded
}

// Tenants answers the tenants in force.
func (s *Supervisor) Tenants() *tenant.Set { return s.tenants.Load() }

// InUse answers what a tenant and all below it hold now.
func (s *Supervisor) InUse(path tenant.Path) tenant.Quota { return admit.Sum(path, s.claims()) }

// List answers every record, oldest first.
func (s *Supervisor) List() []sandbox.Record {
	s.mu.Lock()
	recs := make([]sandbox.Record, 0, len(s.boxes))
	for _, b := range s.boxes {
		recs = append(recs, b.record())
	}
	s.mu.Unlock()
	sort.Slice(recs, func(i, j int) bool {
		if !recs[i].Created.Equal(recs[j].Created) {
			return recs[i].Created.Before(recs[j].Created)
		}
		return recs[i].ID < recs[j].ID
	})
	return recs
}

// Find resolves a reference among the sandboxes that may says yes to: an id, a
// prefix of an id of at least 4 characters, tenant:name, or a name.
func (s *Supervisor) Find(ref string, may func(tenant.Path) bool) (sandbox.Record, error) {
	var hits []sandbox.Record
	for _, rec := range s.List() {
		if !may(rec.Spec.Tenant) {
			continue
		}
		if rec.ID == ref || string(rec.Spec.Tenant)+":"+rec.Spec.Name == ref {
			return rec, nil
		}
		if rec.Spec.Name == ref || len(ref) >= 4 && strings.HasPrefix(rec.ID, ref) {
			hits = append(hits, rec)
		}
	}
	switch len(hits) {
	case 0:
		return sandbox.Record{}, fmt.Errorf("%w: %q; see `bulkhead ls -a`", ErrNotFound, ref)
	case 1:
		return hits[0], nil
	}
	return sandbox.Record{}, fmt.Errorf("%q: %w: %s:%s and %s:%s; name the tenant too",
		ref, ErrAmbiguous, hits[0].Spec.Tenant, hits[0].Spec.Name, hits[1].Spec.Tenant, hits[1].Spec.Name)
}

// Warnings answers what an operator should know, sorted.
func (s *Supervisor) Warnings() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, w := range s.warnings {
		out = append(out, w)
	}
	sort.Strings(out)
	return out
}

// Warn sets or, with an empty text, clears a standing warning of somebody else.
func (s *Supervisor) Warn(key, text string) { s.warn(key, text) }

// warn sets or, with an empty text, clears a standing warning.
func (s *Supervisor) warn(key, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if text == "" {
		delete(s.warnings, key)
		return
	}
	s.warnings[key] = text
}

func (s *Supervisor) box(id string) (*box, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.boxes[id]
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	return b, nil
}

// fault is where tests break a step or kill the process.
func (s *Supervisor) fault(point string) error {
	if s.cfg.Fault == nil {
		return nil
	}
	return s.cfg.Fault(point)
}
