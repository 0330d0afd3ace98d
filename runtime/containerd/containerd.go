// SPDX-License-Identifier: Apache-2.0

// Package containerd runs tasks through containerd and its runc shim.
//
// It owns, in one containerd namespace: a container, a snapshot and a task of
// the same id for every sandbox, the images, and below Config.Dir the FIFOs of
// interactive tasks. It never touches cgroups, links or policy: paths of them
// come in a runtime.Spec as plain values. All knowledge of a task is in
// containerd, so that any process may find it again.
//
// # Life of a task
//
//	Create: image -> snapshot + container + hold -> task (runc init waits)
//	Start:  runc init executes the command
//	Remove: SIGKILL -> task deleted -> container + snapshot + hold + FIFOs
//
// The hold is a record in containerd's store of sandboxes, never run as one. A
// containerd that starts deletes the shim of every task that has no process
// left, unless a sandbox has its id; and with the shim goes the exit of a
// command that ended while containerd was away.
//
// Create undoes itself on an error. After a crash in the middle of it, Remove
// clears what it had made: everything carries the id, nothing is found by
// guessing.
//
// # Output
//
// The output of a task without terminal and stdin goes from the shim straight
// into its logger, cmd/bulkhead-log, which outlives this process. The log is
// complete once Remove has returned.
//
// The streams of a task with a terminal or stdin are FIFOs that this process
// relays, to the log and to whoever is attached. While no process relays, a
// command that writes more than the FIFO holds (1 MiB) waits. Should it end in
// that time, what is still in the FIFO is lost. Find takes up the relay again.
//
// Exec'd processes belong to their caller: their streams end with this process,
// and the next Find of the task kills those that it finds left over.
//
// # What certain means
//
// Find answers runtime.ErrNotFound only if containerd answers that it has no
// such task and runc's own state has no living process of it. No answer, a slow
// answer or any other error is not that.
//
// # Locks
//
// Lock order: the lock of an id, then Runtime.mu, then relay.mu. Only the lock
// of an id is held during a call to containerd.
package containerd

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// Defaults of a Config.
const (
	DefaultAddress     = "/run/containerd/containerd.sock"
	DefaultNamespace   = "bulkhead"
	DefaultSnapshotter = "overlayfs"
	DefaultRuncRoot    = "/run/bulkhead/runc"
	DefaultCallLimit   = 60 * time.Second
)

// shimRuntime is the only shim this package speaks to: what it stores in a task
// and where is part of what Find and Remove know.
const shimRuntime = "io.containerd.runc.v2"

// Config of a Runtime. Dir and Logger are required.
type Config struct {
	Address     string // containerd's socket
	Namespace   string // of containerd; nobody else may use it
	Snapshotter string
	// Dir holds the FIFOs of interactive tasks. It must survive this process
	// and may be lost at boot.
	Dir    string
	Logger string // absolute path of bulkhead-log
	// Runc is the OCI runtime: an absolute path, or a name that is looked up on
	// containerd's PATH. Empty: runc.
	Runc string
	// RuncRoot is where it keeps its state.
	RuncRoot string
	// CallLimit is how long one answer of containerd may take. It bounds the
	// calls that a cancelled context must not cut in half.
	CallLimit time.Duration
	Log       *slog.Logger
}

// Runtime speaks to one containerd. All methods may be called at once.
type Runtime struct {
	cfg       Config
	client    *client.Client
	tasks     tasksapi.TasksClient
	snapshots snapshots.Snapshotter
	log       *slog.Logger
	images    imageCache
	users     userCache
	// slowReader is the constant of that name, or less in tests.
	slowReader time.Duration

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // everything that Close waits for

	locks idLocks

	mu    sync.Mutex
	known map[string]*task // tasks this process has made or found, by id
}

var _ runtime.Runtime = (*Runtime)(nil)

// Open connects to containerd. It does not wait for it: a containerd that is
// away makes the calls fail, and they work again when it is back.
func Open(cfg Config) (*Runtime, error) {
	setDefault(&cfg.Address, DefaultAddress)
	setDefault(&cfg.Namespace, DefaultNamespace)
	setDefault(&cfg.Snapshotter, DefaultSnapshotter)
	setDefault(&cfg.RuncRoot, DefaultRuncRoot)
	if cfg.CallLimit <= 0 {
		cfg.CallLimit = DefaultCallLimit
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	for _, p := range []struct{ name, path string }{{"dir", cfg.Dir}, {"logger", cfg.Logger}, {"runc root", cfg.RuncRoot}} {
		if !filepath.IsAbs(p.path) {
			return nil, fmt.Errorf("open container runtime: %s %q is not an absolute path", p.name, p.path)
		}
	}
	// The logger's path and arguments travel in a URI.
	if strings.ContainsAny(cfg.Logger, "?#%") {
		return nil, fmt.Errorf("open container runtime: logger path %q holds one of ?#%%", cfg.Logger)
	}
	if st, err := os.Stat(cfg.Logger); err != nil {
		return nil, fmt.Errorf("open container runtime: logger: %w", err)
	} else if st.IsDir() || st.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("open container runtime: logger %s is not a program", cfg.Logger)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open container runtime: %w", err)
	}
	dial := func(ctx context.Context, target string) (net.Conn, error) {
		conn, err := dialer.ContextDialer(ctx, target)
		if err != nil {
			return nil, fmt.Errorf("containerd does not answer on %s: is it running? (systemctl status containerd)", cfg.Address)
		}
		return conn, nil
	}
	c, err := client.New(cfg.Address,
		client.WithDefaultNamespace(cfg.Namespace),
		client.WithDialOpts([]grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(dial),
			// containerd restarts in a second or two; the library's own
			// longest wait is much more.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
				MinConnectTimeout: 5 * time.Second,
			}),
		}))
	if err != nil {
		return nil, fmt.Errorf("open container runtime: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Runtime{
		cfg:       cfg,
		client:    c,
		tasks:     c.TaskService(),
		snapshots: c.SnapshotService(cfg.Snapshotter),
		log:       cfg.Log,
		ctx:       ctx,
		cancel:    cancel,
		known:     map[string]*task{},

		slowReader: slowReader,
	}
	r.wg.Go(func() { r.watchEvents(ctx) })
	return r, nil
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// Version of containerd.
func (r *Runtime) Version(ctx context.Context) (string, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	v, err := r.client.Version(ctx)
	if err != nil {
		return "", fmt.Errorf("containerd version: %w", native(err))
	}
	return v.Version, nil
}

// Close ends relays, exec streams and Waits of this process. Tasks run on.
func (r *Runtime) Close() error {
	r.cancel()
	r.mu.Lock()
	for _, t := range r.known {
		if t.relay != nil {
			t.relay.close()
		}
	}
	r.mu.Unlock()
	r.wg.Wait()
	return r.client.Close()
}

// bound limits one call by CallLimit beside the caller's own limit.
func (r *Runtime) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, r.cfg.CallLimit)
}

// finish is for a call that must come to its end even if the caller gives up,
// because half of it would leave things of which nobody knows.
func (r *Runtime) finish(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), r.cfg.CallLimit)
}

// randomID is unique for all practical purposes, and fits containerd's names.
func randomID() string { return strings.ToLower(rand.Text()[:16]) }
