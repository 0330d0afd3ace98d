// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// endLimit is how long the processes of a task may take to end after SIGKILL:
// one that waits for a device ends when the device answers.
const endLimit = 30 * time.Second

// Remove clears everything of an id. It may be called again after an error, and
// goes on where that stopped.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	if !validID(id) {
		return nil // nothing can have such an id
	}
	defer r.lock(id)()
	if err := r.remove(ctx, id); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	return nil
}

func (r *Runtime) remove(ctx context.Context, id string) error {
	// Whoever gives up waiting must not leave half: each step ends on its own.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*r.cfg.CallLimit)
	defer cancel()
	if err := r.removeTask(ctx, id); err != nil {
		return err
	}
	r.forget(id)
	// Nothing of the rest needs another part. List finds the id by any of them,
	// so that a Remove that fails can be done again.
	parts := []func(context.Context, string) error{r.removeContainer, r.removeSnapshot, r.removeHold, r.removeFIFOs}
	errs := make([]error, len(parts))
	var wg sync.WaitGroup
	for i, part := range parts {
		wg.Go(func() { errs[i] = part(ctx, id) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (r *Runtime) removeContainer(ctx context.Context, id string) error {
	if err := gone(r.client.ContainerService().Delete(ctx, id)); err != nil {
		return fmt.Errorf("delete container: %w", err)
	}
	return nil
}

func (r *Runtime) removeHold(ctx context.Context, id string) error {
	if err := gone(r.client.SandboxStore().Delete(ctx, id)); err != nil {
		return fmt.Errorf("delete hold: %w", err)
	}
	return nil
}

func (r *Runtime) removeFIFOs(_ context.Context, id string) error {
	if err := os.RemoveAll(r.fifoDir(id)); err != nil {
		return fmt.Errorf("remove FIFOs: %w", err)
	}
	return nil
}

// removeTask kills and deletes the task and what runc still has of it.
func (r *Runtime) removeTask(ctx context.Context, id string) error {
	err := r.endTask(ctx, id)
	if err == nil {
		_, err = r.tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
		err = native(err)
	}
	if isNotFound(err) {
		err = r.removeOrphan(ctx, id)
	}
	if err != nil {
		return fmt.Errorf("delete task: %w", err)
	}
	return r.removeRunc(ctx, id)
}

// removeOrphan is for what containerd calls not found for want of a container,
// or of a task, though a task, or a shim without one, may be there.
func (r *Runtime) removeOrphan(ctx context.Context, id string) error {
	record, err := r.record(runtime.Spec{ID: id}, imageInfo{}, &specs.Spec{Version: specs.Version})
	if err != nil {
		return err
	}
	if _, err := r.client.ContainerService().Create(ctx, record); err != nil && !isExists(err) {
		return fmt.Errorf("store container for deleting: %w", err)
	}
	if err := gone(r.endTask(ctx, id)); err != nil {
		return err
	}
	_, err = r.tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
	return errors.Join(gone(native(err)), r.removeShims(id))
}

// endTask kills the task and waits for its end. It answers NotFound if
// containerd has no such task or container.
func (r *Runtime) endTask(ctx context.Context, id string) error {
	if r.recall(id) == nil {
		p, err := r.state(ctx, id, "")
		if isNotFound(err) {
			return err
		}
		if err == nil && filepath.IsAbs(p.Stdout) {
			// The shim does not let go of a task whose output nobody reads.
			if t, err := r.adopt(ctx, id, p); err == nil {
				r.remember(t)
			}
		}
	}
	// An error says that it is over already, or else the wait will show.
	_, killErr := r.tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: id, Signal: uint32(syscall.SIGKILL), All: true})
	wctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	exit, err := r.waitProcess(wctx, id, "")
	if isNotFound(err) {
		return err
	}
	if err != nil {
		return fmt.Errorf("its processes do not end: %w", errors.Join(native(killErr), err))
	}
	if t := r.recall(id); t != nil {
		t.news.set(func() { t.news.exit = &exit }) // for whoever waits
	}
	return nil
}

// removeRunc has runc remove what it still knows of the container: containerd
// may have lost its shim, and the container lives on.
func (r *Runtime) removeRunc(ctx context.Context, id string) error {
	if _, err := os.Stat(r.runcDir(id)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	runc := r.cfg.Runc
	setDefault(&runc, "runc")
	cmd := exec.CommandContext(ctx, runc, "--root", filepath.Join(r.cfg.RuncRoot, r.cfg.Namespace), "delete", "--force", id)
	out, err := cmd.CombinedOutput()
	if _, serr := os.Stat(r.runcDir(id)); errors.Is(serr, os.ErrNotExist) {
		return nil // by us, or by the shim meanwhile
	}
	if err == nil {
		return fmt.Errorf("runc delete: state of %s is still there", id)
	}
	return fmt.Errorf("runc delete: %w: %s", err, bytes.TrimSpace(out))
}

// removeSnapshot removes the writable layer. The shim may still be unmounting.
func (r *Runtime) removeSnapshot(ctx context.Context, id string) error {
	for {
		err := gone(r.snapshots.Remove(ctx, id))
		if err == nil {
			return nil
		}
		if !errdefs.IsFailedPrecondition(err) && !strings.Contains(err.Error(), "busy") {
			return fmt.Errorf("remove snapshot: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove snapshot: %w", errors.Join(err, ctx.Err()))
		case <-time.After(retryMin):
		}
	}
}

// List answers the ids of everything that is ours and left.
func (r *Runtime) List(ctx context.Context) ([]string, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	var ids []string
	cs, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	for _, c := range cs {
		ids = append(ids, c.ID)
	}
	ts, err := r.tasks.List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", native(err))
	}
	for _, t := range ts.Tasks {
		ids = append(ids, t.ID)
	}
	holds, err := r.client.SandboxStore().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list holds: %w", err)
	}
	for _, h := range holds {
		ids = append(ids, h.ID)
	}
	err = r.snapshots.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if id := info.Labels[labelSnapshot]; id != "" {
			ids = append(ids, id)
		}
		return nil
	}, fmt.Sprintf("labels.%q", labelSnapshot))
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	shims, err := r.shims()
	if err != nil {
		return nil, fmt.Errorf("list shims: %w", err)
	}
	ids = slices.AppendSeq(ids, maps.Keys(shims))
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// processStart answers when a process started, in ticks after boot, and its
// state.
func processStart(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may hold anything.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, 0, fmt.Errorf("read /proc/%d/stat: not as expected", pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return start, f[0][0], nil
}

// idLocks lets one Create, Find or Remove of an id run at a time.
type idLocks struct {
	mu   sync.Mutex
	held map[string]*idLock
}

type idLock struct {
	mu    sync.Mutex
	users int // that hold it or wait for it
}

// lock locks an id and answers what unlocks it.
func (r *Runtime) lock(id string) func() {
	l := &r.locks
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*idLock{}
	}
	h := l.held[id]
	if h == nil {
		h = &idLock{}
		l.held[id] = h
	}
	h.users++
	l.mu.Unlock()
	h.mu.Lock()
	return func() {
		h.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(l.held, id)
		}
	}
}
