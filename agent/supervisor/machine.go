// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"log/slog"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/place"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Store keeps records and meter marks; agent/store is the real one.
type Store interface {
	Reserve(rec sandbox.Record, maxSlot uint32, taken map[uint32]string) (sandbox.Record, error)
	Put(rec sandbox.Record) error
	PutAll(recs []sandbox.Record) error // all or none
	Load() ([]sandbox.Record, error)
	Release(id string) error
	Delete(id string) error
	PutMarks(marks map[string]meter.Mark) error
	Marks() (map[string]meter.Mark, error)
}

// Links makes and removes the network of a sandbox.
type Links interface {
	Create(ctx context.Context, id string, p sandbox.Plan) (ifindex int, err error)
	Up(id string) error
	Down(id string) error
	Remove(id string) error
	List() ([]string, error)
	Publish(id string, ports []sandbox.Port) error // in place of what it published before
	Verify(id string) error                        // nil, or what of its network is not as it must be
	VerifyTable() error                            // the same of what all links share
	Restore() error                                // makes that anew
}

// Names answers the questions of a sandbox for names, inside its network
// namespace; netpol/dns is the real one.
type Names interface {
	// Start begins to answer. p must be in force; what was learned before a
	// restart of the agent is taken up again. It may be repeated. On
	// ErrNoResolver all is done but that it answers.
	Start(ctx context.Context, id string, slot uint32, netns string, p netpol.Program) error
	// Stop ends it and forgets what was learned. Nil if there is nothing.
	Stop(id string) error
	// Swap calls apply, which puts p in force, with what names have taught
	// and p still allows; nothing is learned meanwhile. p is used from then on
	// if apply answers nil, else the old program still is. Before Start it is
	// what was learned before a restart of the agent.
	Swap(id string, p netpol.Program, apply func(learned []netpol.Learned) error) error
}

// Budgets gives the kernel the byte budgets of programs; agent/budget is the
// real one.
type Budgets interface {
	Ensure(id string, slot uint32, p netpol.Program) error // before p is put in force
	Release(id string, slot uint32) error                  // what was spent is on disk, the sandbox's own are forgotten
}

// Traffic is what a sandbox was allowed to send and receive, in L3 bytes.
type Traffic struct{ EgressBytes, IngressBytes uint64 }

// Enforcement is what the egress program must hold for one sandbox.
type Enforcement struct {
	ID      string
	Plan    sandbox.Plan
	Ifindex int
	Program netpol.Program
	Learned []netpol.Learned // what names have taught so far
	Rev     uint64
}

// Egress attaches policy to a link and reads its counters.
type Egress interface {
	Attach(ctx context.Context, e Enforcement) error
	SetPolicy(id string, slot uint32, p netpol.Program, rev uint64, learned []netpol.Learned) error
	Verify(id string, slot uint32, ifindex int) error
	Traffic(slot uint32) (Traffic, error)
	Detach(id string, slot uint32) error
	List() ([]string, error)
	Slots() (map[uint32]string, error) // ids by slot
}

// CgroupUsage is what the kernel says a sandbox has used; nil is unknown.
type CgroupUsage struct{ CPUNs, MemoryUsed, OOMKills *uint64 }

// Cgroups keeps the tenants' tree.
type Cgroups interface {
	Ensure(path string, q tenant.Quota) error
	Usage(tenant, id string) (CgroupUsage, error) // fs.ErrNotExist once it is gone
	Kill(tenant, id string) error
	WaitEmpty(ctx context.Context, tenant, id string) error
	Remove(tenant, id string) error
	List() ([]string, error) // ids
}

// Launcher is what the supervisor needs of a container runtime.
type Launcher interface {
	Image(ctx context.Context, ref string) (runtime.Image, error)
	Create(ctx context.Context, s runtime.Spec) (runtime.Task, error)
	Find(ctx context.Context, id string) (runtime.Task, error)
	Remove(ctx context.Context, id string) error
	List(ctx context.Context) ([]string, error)
}

// Spool makes usage records durable.
type Spool interface {
	Append(ctx context.Context, recs []*usagev1.Record) error
	Forget(sandbox string) error
}

// Config of a Supervisor. All fields are required unless they say otherwise.
type Config struct {
	Log          *slog.Logger
	Place        place.Node
	Defaults     sandbox.Limits          // for limits that a Spec leaves at zero
	Biggest      sandbox.Limits          // what one sandbox can have at most
	Capacity     tenant.Quota            // what all can have together
	PublishPorts admit.Ports             // of the node, that sandboxes may publish
	HostListens  func(sandbox.Port) bool // optional: whether a service of the node has a port
	MaxSlot      uint32
	LogMaxBytes  int64
	LogFiles     int
	ResolvConf   string // path; optional
	Hosts        string // path; optional
	Partial      bool   // cgroup limits may be left out
	NotEnforced  []string
	Interval     time.Duration // between usage samples
	VerifyEvery  time.Duration // between checks that egress is enforced
	Grace        time.Duration // default between TERM and KILL
	BootID       string
	Source       string        // of usage records
	SpoolFull    func() string // not empty: why usage cannot be recorded
	Tenants      *tenant.Set
	Store        Store
	Links        Links
	Names        Names // optional: without it no name resolves, and no policy that allows some is admitted
	Budgets      Budgets
	Egress       Egress
	Cgroups      Cgroups
	Runtime      Launcher
	Spool        Spool
	KeepStopped  int // stopped sandboxes of one tenant whose record and log are kept
	RemoveLog    func(id string) error
	BootTime     func() time.Duration     // CLOCK_BOOTTIME
	Fault        func(point string) error // optional; tests break or kill here
	LingerRemove time.Duration            // before an auto-remove sandbox is forgotten
}
