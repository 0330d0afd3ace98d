// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/bulkheadhq/bulkhead/runtime"
)

const (
	// retryMin and retryMax space the attempts of Wait while containerd is away.
	retryMin = 50 * time.Millisecond
	retryMax = time.Second
	// eventGrace is how long an event may come after the answer that it
	// belongs to.
	eventGrace = 200 * time.Millisecond
	// deadShimGrace is how long containerd may take to clean up after a shim
	// that died and to say how the task ended.
	deadShimGrace = 15 * time.Second
)

// task is one task as this process knows it. There is one of an id at a time.
type task struct {
	r        *Runtime
	id       string
	pid      uint32
	process  *specs.Process // of the command; exec'd processes are made after it
	terminal bool
	memory   bool // has a memory limit
	relay    *relay

	news news // what events have said of it

	// killed: KILL was asked for here, so a death by it needs no other reason.
	killed atomic.Bool
}

var _ runtime.Task = (*task)(nil)

func (t *task) ID() string  { return t.id }
func (t *task) PID() uint32 { return t.pid }

// remember makes t the task of its id.
func (r *Runtime) remember(t *task) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known[t.id] = t
}

// recall answers the known task of an id, or nil.
func (r *Runtime) recall(id string) *task {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known[id]
}

// forget drops what is known of an id and ends its relay.
func (r *Runtime) forget(id string) {
	r.mu.Lock()
	t := r.known[id]
	delete(r.known, id)
	r.mu.Unlock()
	if t != nil && t.relay != nil {
		t.relay.close()
	}
}

// Find adopts a task, or answers the one this process knows already.
func (r *Runtime) Find(ctx context.Context, id string) (runtime.Task, error) {
	if !validID(id) {
		return nil, fmt.Errorf("find %q: %w", id, runtime.ErrNotFound)
	}
	defer r.lock(id)()
	t, err := r.find(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", id, err)
	}
	return t, nil
}

func (r *Runtime) find(ctx context.Context, id string) (*task, error) {
	p, err := r.state(ctx, id, "")
	if isNotFound(err) {
		return nil, r.certainlyGone(id)
	}
	if err != nil {
		return nil, err
	}
	if t := r.recall(id); t != nil {
		if p.Status == tasktypes.Status_STOPPED || t.pid == p.Pid {
			return t, nil
		}
		// Somebody else has made it anew.
		r.forget(id)
	}
	t, err := r.adopt(ctx, id, p)
	if err != nil {
		return nil, err
	}
	r.remember(t)
	return t, nil
}

// certainlyGone answers runtime.ErrNotFound unless runc's own state has a living
// process: containerd forgets the tasks whose shim it could not reach.
func (r *Runtime) certainlyGone(id string) error {
	pid, alive, err := r.runcInit(id)
	switch {
	case err != nil:
		return err
	case alive:
		return fmt.Errorf("containerd knows no such task, but its process %d lives", pid)
	}
	return runtime.ErrNotFound
}

// runcInit reads runc's state of a container and says whether its first process
// lives.
func (r *Runtime) runcInit(id string) (pid int, alive bool, err error) {
	b, err := os.ReadFile(filepath.Join(r.runcDir(id), "state.json"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read runc state: %w", err)
	}
	var s struct {
		Pid   int    `json:"init_process_pid"`
		Start uint64 `json:"init_process_start"`
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return 0, false, fmt.Errorf("read runc state: %w", err)
	}
	if s.Pid <= 0 {
		return 0, false, nil
	}
	start, state, err := processStart(s.Pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return s.Pid, false, nil
	}
	if err != nil {
		return s.Pid, false, err
	}
	return s.Pid, start == s.Start && state != 'Z' && state != 'X', nil
}

func (r *Runtime) runcDir(id string) string {
	return filepath.Join(r.cfg.RuncRoot, r.cfg.Namespace, id)
}

// state asks for one process of a task; unknown is an error.
func (r *Runtime) state(ctx context.Context, id, execID string) (*tasktypes.Process, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	resp, err := r.tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: id, ExecID: execID})
	if err != nil {
		return nil, native(err)
	}
	if resp.Process.GetStatus() == tasktypes.Status_UNKNOWN {
		return nil, errors.New("the runtime does not know the task's state")
	}
	return resp.Process, nil
}

// adopt makes a task of what containerd has stored.
func (r *Runtime) adopt(ctx context.Context, id string, p *tasktypes.Process) (*task, error) {
	cctx, cancel := r.bound(ctx)
	defer cancel()
	c, err := r.client.ContainerService().Get(cctx, id)
	if err != nil {
		return nil, fmt.Errorf("read container: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("read OCI spec: %w", err)
	}
	if spec.Process == nil {
		return nil, errors.New("read OCI spec: no process")
	}
	t := &task{r: r, id: id, pid: p.Pid, process: spec.Process, terminal: p.Terminal}
	t.memory = spec.Linux != nil && spec.Linux.Resources != nil && spec.Linux.Resources.Memory != nil
	if err := r.endExecs(ctx, id); err != nil {
		return nil, err
	}
	if filepath.IsAbs(p.Stdout) {
		cfg, err := logConfigOf(c.Labels)
		if err != nil {
			return nil, err
		}
		f := &fifos{dir: r.fifoDir(id), stdin: p.Stdin, stdout: p.Stdout, stderr: p.Stderr}
		if err := f.open(); err != nil {
			f.close()
			return nil, err
		}
		t.relay = newRelay(r, id, f, p.Terminal, cfg)
		t.relay.run(&r.wg)
	}
	return t, nil
}

// Start lets the command run.
func (t *task) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("start %s: %w", t.id, err)
	}
	ctx, cancel := t.r.finish(ctx)
	defer cancel()
	if _, err := t.r.tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: t.id}); err != nil {
		return fmt.Errorf("start %s: %w", t.id, commandError(native(err)))
	}
	return nil
}

// Wait asks containerd until it has an answer: a containerd that is away for a
// while has not ended the command.
func (t *task) Wait(ctx context.Context) (runtime.Exit, error) {
	ctx, cancel := t.r.until(ctx)
	defer cancel()
	exit, err := t.r.waitProcess(ctx, t.id, "")
	if isNotFound(err) {
		// Removed, or its shim died and containerd cleaned up after it and said
		// how the task ended.
		if lost, ok := t.news.lostExit(ctx, eventGrace); ok {
			exit, err = lost, nil
		} else {
			err = runtime.ErrNotFound
		}
	}
	if err != nil {
		return runtime.Exit{}, fmt.Errorf("wait for %s: %w", t.id, err)
	}
	if t.relay != nil {
		// The log of an interactive task is complete when Wait answers.
		select {
		case <-t.relay.done:
		case <-ctx.Done():
		case <-time.After(outputGrace):
		}
	}
	grace := time.Duration(0)
	if t.memory && exit.Code == 128+uint32(syscall.SIGKILL) && !t.killed.Load() {
		grace = eventGrace
	}
	exit.OOMKilled = t.news.oomKilled(ctx, grace)
	return exit, nil
}

// waitProcess blocks until a process is over. NotFound means that containerd
// certainly has it no more.
func (r *Runtime) waitProcess(ctx context.Context, id, execID string) (runtime.Exit, error) {
	for pause, odd := retryMin, 0; ; pause = min(2*pause, retryMax) {
		resp, err := r.tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: execID})
		if err == nil {
			return runtime.Exit{Code: resp.ExitStatus, Time: resp.ExitedAt.AsTime()}, nil
		}
		if ctx.Err() != nil {
			return runtime.Exit{}, context.Cause(ctx)
		}
		if isNotFound(err) {
			return runtime.Exit{}, native(err)
		}
		// containerd away, or the shim's connection broken: the next attempt
		// shows which. Other errors are given some attempts too, because a
		// shim that dies answers in many ways.
		if !isUnavailable(err) {
			if odd++; time.Duration(odd)*retryMax > deadShimGrace {
				return runtime.Exit{}, native(err)
			}
		}
		r.log.DebugContext(ctx, "wait again", "sandbox", id, "exec", execID, "err", err)
		select {
		case <-ctx.Done():
			return runtime.Exit{}, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// errClosed: Close was called while something waited.
var errClosed = errors.New("container runtime closed")

// until answers a context that ends with the caller's or with Close.
func (r *Runtime) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(r.ctx, func() { cancel(errClosed) })
	return ctx, func() { stop(); cancel(nil) }
}

// Kill signals the command, or all processes of the task.
func (t *task) Kill(ctx context.Context, sig syscall.Signal, all bool) error {
	if sig == syscall.SIGKILL {
		t.killed.Store(true)
	}
	ctx, cancel := t.r.bound(ctx)
	defer cancel()
	_, err := t.r.tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: t.id, Signal: uint32(sig), All: all})
	if err != nil {
		return fmt.Errorf("signal %s: %w", t.id, notRunning(err))
	}
	return nil
}

// Resize sets the size of the terminal.
func (t *task) Resize(ctx context.Context, rows, cols uint32) error {
	if !t.terminal {
		return fmt.Errorf("resize %s: %w", t.id, runtime.ErrNoTerminal)
	}
	if err := t.r.resize(ctx, t.id, "", rows, cols); err != nil {
		return fmt.Errorf("resize %s: %w", t.id, err)
	}
	return nil
}

func (r *Runtime) resize(ctx context.Context, id, execID string, rows, cols uint32) error {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	_, err := r.tasks.ResizePty(ctx, &tasksapi.ResizePtyRequest{ContainerID: id, ExecID: execID, Width: cols, Height: rows})
	if err != nil {
		return notRunning(err)
	}
	return nil
}

func (r *Runtime) closeIO(ctx context.Context, id, execID string) error {
	_, err := r.tasks.CloseIO(ctx, &tasksapi.CloseIORequest{ContainerID: id, ExecID: execID, Stdin: true})
	return native(err)
}

// Attach relays until the output ends, the context ends or the reader fails.
func (t *task) Attach(ctx context.Context, stdio runtime.IO) error {
	if t.relay == nil {
		return fmt.Errorf("attach to %s: %w", t.id, runtime.ErrNoAttach)
	}
	if err := t.relay.serve(ctx, stdio); err != nil {
		return fmt.Errorf("attach to %s: %w", t.id, err)
	}
	return nil
}

// Status asks containerd.
func (t *task) Status(ctx context.Context) (runtime.Status, error) {
	p, err := t.r.state(ctx, t.id, "")
	if isNotFound(err) {
		err = t.r.certainlyGone(t.id)
	}
	if err != nil {
		return runtime.Status{}, fmt.Errorf("status of %s: %w", t.id, err)
	}
	switch p.Status {
	case tasktypes.Status_CREATED:
		return runtime.Status{State: runtime.StateCreated, PID: p.Pid}, nil
	case tasktypes.Status_RUNNING:
		return runtime.Status{State: runtime.StateRunning, PID: p.Pid}, nil
	case tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
		return runtime.Status{State: runtime.StatePaused, PID: p.Pid}, nil
	case tasktypes.Status_STOPPED:
		exit := runtime.Exit{Code: p.ExitStatus, Time: p.ExitedAt.AsTime(), OOMKilled: t.news.oomKilled(ctx, 0)}
		return runtime.Status{State: runtime.StateStopped, Exit: exit}, nil
	}
	return runtime.Status{}, fmt.Errorf("status of %s: unknown state %s", t.id, p.Status)
}
