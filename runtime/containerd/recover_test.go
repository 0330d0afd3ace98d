// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"

	"github.com/bulkheadhq/bulkhead/runtime"
)

const patience = 60 * time.Second

func launch(t testing.TB, r *Runtime, s runtime.Spec) runtime.Task {
	t.Helper()
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return task
}

func wait(t testing.TB, task interface {
	Wait(context.Context) (runtime.Exit, error)
},
) runtime.Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	exit, err := task.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return exit
}

// restart kills containerd, does what happens meanwhile, and starts it again.
func restart(t testing.TB, meanwhile func()) {
	t.Helper()
	if err := node.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	meanwhile()
	if err := node.daemon.Up(); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for something that containerd does by itself.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func alive(pid uint32) bool {
	_, state, err := processStart(int(pid))
	return err == nil && state != 'Z' && state != 'X'
}

// wantNothing: after Remove nothing of an id is left anywhere.
func wantNothing(t testing.TB, r *Runtime, id string) {
	t.Helper()
	if err := r.Remove(t.Context(), id); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if _, err := r.Find(t.Context(), id); !errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("find: got %v, want not found", err)
	}
	if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, id) {
		t.Errorf("list: got %v, %v", ids, err)
	}
	if _, err := os.Stat(r.fifoDir(id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("FIFOs: %v", err)
	}
	for _, l := range node.daemon.Leftovers() {
		if strings.Contains(l, id) {
			t.Errorf("left over: %s", l)
		}
	}
	if pids := node.daemon.ShimPids(id); len(pids) > 0 {
		t.Errorf("shims left: %v", pids)
	}
}

// TestShimThatContainerdForgot: one that comes up when everybody has given it
// up is found, and removed. One of another containerd or namespace is not.
func TestShimThatContainerdForgot(t *testing.T) {
	r := start(t)
	id := "t" + strconv.Itoa(os.Getpid()) + "-forgotten"
	shim := func(namespace, address string) *exec.Cmd {
		c := exec.Command("/proc/self/exe")
		c.Args = []string{"/usr/bin/" + shimProgram, "-namespace", namespace, "-id", id, "-address", address}
		c.Env = append(os.Environ(), idleEnv+"=1")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		return c
	}
	others := []*exec.Cmd{shim("another", r.cfg.Address), shim(r.cfg.Namespace, "/run/another.sock")}
	if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, id) {
		t.Errorf("list with shims of others: got %v, %v", ids, err)
	}
	ours := shim(r.cfg.Namespace, r.cfg.Address)
	if ids, err := r.List(t.Context()); err != nil || !slices.Contains(ids, id) {
		t.Errorf("list: got %v, %v", ids, err)
	}
	if err := r.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := ours.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it ended with %v", err)
	}
	for _, c := range others {
		if !alive(uint32(c.Process.Pid)) {
			t.Errorf("another's shim was killed: %v", c.Args)
		}
	}
	if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, id) {
		t.Errorf("list afterwards: got %v, %v", ids, err)
	}
}

func TestWaitOverRestartOfContainerd(t *testing.T) {
	r := start(t)
	task := launch(t, r, newSpec(t, r, "sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.1; done"))
	got := make(chan runtime.Exit, 1)
	go func() { got <- wait(t, task) }()
	time.Sleep(300 * time.Millisecond) // the trap is set
	restart(t, func() { time.Sleep(200 * time.Millisecond) })
	select {
	case exit := <-got:
		t.Fatalf("the restart looks like exit %+v", exit)
	case <-time.After(200 * time.Millisecond):
	}
	if err := task.Kill(t.Context(), syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if exit := <-got; exit.Code != 8 {
		t.Errorf("exit: got %d, want 8", exit.Code)
	}
}

func TestExitWhileContainerdIsAway(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sh", "-c", "sleep 0.3; exit 5")
	task := launch(t, r, s)
	restart(t, func() { eventually(t, "the command ends", func() bool { return !alive(task.PID()) }) })
	other := openRuntime(t)
	defer other.Close()
	found, err := other.Find(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range []runtime.Task{task, found} {
		if exit := wait(t, task); exit.Code != 5 {
			t.Errorf("exit: got %d, want 5", exit.Code)
		}
	}
}

// TestAwayIsNotGone: no answer is never taken for "not there".
func TestAwayIsNotGone(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	task := launch(t, r, s)
	restart(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		check := func(what string, err error) {
			t.Helper()
			if err == nil || errors.Is(err, runtime.ErrNotFound) || errors.Is(err, runtime.ErrNotRunning) || errors.Is(err, runtime.ErrImageNotFound) {
				t.Errorf("%s: got %v", what, err)
			}
		}
		_, err := r.Find(ctx, s.ID)
		check("find", err)
		_, err = task.Status(ctx)
		check("status", err)
		check("kill", task.Kill(ctx, syscall.SIGTERM, false))
		_, err = task.Exec(ctx, runtime.ExecSpec{Command: []string{"true"}}, runtime.IO{})
		check("exec", err)
		_, err = r.List(ctx)
		check("list", err)
		_, err = r.Image(ctx, s.Image)
		check("image", err)
		_, err = r.Create(ctx, s)
		check("create", err)
	})
	if st, err := task.Status(t.Context()); err != nil || st.State != runtime.StateRunning {
		t.Errorf("status: got %+v, %v", st, err)
	}
}

// TestSlowShimIsNotDead: a shim that does not answer makes no task vanish.
func TestSlowShimIsNotDead(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	task := launch(t, r, s)
	shims := node.daemon.ShimPids(s.ID)
	if len(shims) != 1 {
		t.Fatalf("shims: %v", shims)
	}
	if err := syscall.Kill(shims[0], syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(shims[0], syscall.SIGCONT) }()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := r.Find(ctx, s.ID); err == nil || errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("find: got %v", err)
	}
	if err := syscall.Kill(shims[0], syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Find(t.Context(), s.ID); err != nil {
		t.Errorf("find: %v", err)
	}
	if st, err := task.Status(t.Context()); err != nil || st.State != runtime.StateRunning {
		t.Errorf("status: got %+v, %v", st, err)
	}
}

func TestShimKilled(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprintf("containerd away=%t", away), func(t *testing.T) {
			r := start(t)
			s := newSpec(t, r, "sleep", "1000")
			task := launch(t, r, s)
			kill := func() {
				for _, pid := range node.daemon.ShimPids(s.ID) {
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
				}
			}
			if away {
				restart(t, kill)
			} else {
				kill()
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			// containerd kills what the shim leaves and says so, to who listens.
			exit, err := task.Wait(ctx)
			if err == nil && exit.Code != 137 || err != nil && !errors.Is(err, runtime.ErrNotFound) {
				t.Errorf("wait: got %+v, %v", exit, err)
			}
			eventually(t, "the process ends", func() bool { return !alive(task.PID()) })
			wantNothing(t, r, s.ID)
		})
	}
}

// TestForgottenByContainerd: containerd has lost a task that lives on, as it
// does when it cannot reach a shim at its start.
func TestForgottenByContainerd(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	task := launch(t, r, s)
	restart(t, func() {
		for _, pid := range node.daemon.ShimPids(s.ID) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
		}
		bundle := filepath.Join(node.daemon.Dir, "state", "io.containerd.runtime.v2.task", r.cfg.Namespace, s.ID)
		if err := syscall.Unmount(filepath.Join(bundle, "rootfs"), syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(bundle); err != nil {
			t.Error(err)
		}
	})
	if !alive(task.PID()) {
		t.Fatal("the process did not survive: this tests nothing")
	}
	if _, err := r.Find(t.Context(), s.ID); err == nil || errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("find: got %v, want an error other than not found", err)
	}
	wantNothing(t, r, s.ID)
	if alive(task.PID()) {
		t.Error("the process lives after Remove")
	}
}

// TestLeftovers: Remove clears every state in which a Create or Remove can have
// been cut off, and List shows it.
func TestLeftovers(t *testing.T) {
	image := func(t *testing.T, r *Runtime, s runtime.Spec) imageInfo {
		t.Helper()
		info, err := r.imageInfo(t.Context(), s.Image)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	for _, c := range []struct {
		name string
		make func(*testing.T, *Runtime, runtime.Spec)
	}{
		{"snapshot", func(t *testing.T, r *Runtime, s runtime.Spec) {
			if _, err := r.snapshot(t.Context(), s.ID, image(t, r, s)); err != nil {
				t.Fatal(err)
			}
		}},
		{"container", func(t *testing.T, r *Runtime, s runtime.Spec) {
			makeContainer(t, r, s, image(t, r, s))
		}},
		{"hold", func(t *testing.T, r *Runtime, s runtime.Spec) {
			if _, err := r.client.SandboxStore().Create(t.Context(), sandbox.Sandbox{ID: s.ID}); err != nil {
				t.Fatal(err)
			}
		}},
		{"snapshot and container", func(t *testing.T, r *Runtime, s runtime.Spec) {
			info := image(t, r, s)
			makeContainer(t, r, s, info)
			if _, err := r.snapshot(t.Context(), s.ID, info); err != nil {
				t.Fatal(err)
			}
		}},
		{"task without container", func(t *testing.T, r *Runtime, s runtime.Spec) {
			launch(t, r, s)
			if err := r.client.ContainerService().Delete(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
		}},
		{"task ended", func(t *testing.T, r *Runtime, s runtime.Spec) {
			task := launch(t, r, s)
			if err := task.Kill(t.Context(), syscall.SIGKILL, true); err != nil {
				t.Fatal(err)
			}
			wait(t, task)
		}},
		{"task deleted", func(t *testing.T, r *Runtime, s runtime.Spec) {
			launch(t, r, s)
			if err := r.removeTask(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
		}},
		{"container deleted", func(t *testing.T, r *Runtime, s runtime.Spec) {
			launch(t, r, s)
			if err := r.removeTask(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
			if err := r.client.ContainerService().Delete(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
		}},
		{"interactive, silent reader", func(t *testing.T, r *Runtime, s runtime.Spec) {
			s.Stdin = true
			s.Command = []string{"sh", "-c", "yes"}
			launch(t, r, s)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The one that made it is gone by the time that it is cleared.
			first := openRuntime(t)
			r := start(t)
			s := newSpec(t, r, "sleep", "1000")
			c.make(t, first, s)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			if ids, err := r.List(t.Context()); err != nil || !slices.Contains(ids, s.ID) {
				t.Errorf("list: got %v, %v", ids, err)
			}
			if _, err := r.Create(t.Context(), s); !errors.Is(err, runtime.ErrExists) {
				t.Errorf("create over it: got %v, want exists", err)
			}
			wantNothing(t, r, s.ID)
			launch(t, r, s)
		})
	}
}

func makeContainer(t *testing.T, r *Runtime, s runtime.Spec, info imageInfo) {
	t.Helper()
	spec, err := bundle{spec: s, image: info, limits: readHostLimits()}.build(t.Context(), r.cfg.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	record, err := r.record(s, info, spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.ContainerService().Create(t.Context(), record); err != nil {
		t.Fatal(err)
	}
}

// TestCreateFailsCleanly: whatever makes it fail, nothing is left.
func TestCreateFailsCleanly(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Runtime, *runtime.Spec)
	}{
		{"logger that dies", func(r *Runtime, _ *runtime.Spec) { r.cfg.Logger = "/bin/false" }},
		{"no logger", func(r *Runtime, _ *runtime.Spec) { r.cfg.Logger = "/nowhere/bulkhead-log" }},
		{"no runc", func(r *Runtime, _ *runtime.Spec) { r.cfg.Runc = "/nowhere/runc" }},
		{"no network namespace", func(_ *Runtime, s *runtime.Spec) { s.NetnsPath = "/run/netns/nowhere" }},
		{"no hosts file", func(_ *Runtime, s *runtime.Spec) { s.Hosts = "/nowhere/hosts" }},
		{"no command", func(_ *Runtime, s *runtime.Spec) { s.Command = []string{"/bin/notaprogram"} }},
		{"no command, terminal", func(_ *Runtime, s *runtime.Spec) { s.Command, s.Terminal = []string{"/nowhere"}, true }},
		{"no user", func(_ *Runtime, s *runtime.Spec) { s.User = "nobodyknows" }},
		{"reserved label", func(_ *Runtime, s *runtime.Spec) { s.Labels = map[string]string{labelLogDir: "x"} }},
		{"no FIFO directory", func(r *Runtime, s *runtime.Spec) { r.cfg.Dir, s.Stdin = "/dev/null/x", true }},
		{"no log directory", func(_ *Runtime, s *runtime.Spec) { s.LogDir = "/dev/null/x" }},
		{"little memory", func(_ *Runtime, s *runtime.Spec) { s.MemoryBytes = 64 << 10 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := start(t)
			s := newSpec(t, r, "sleep", "1000")
			bad := openRuntime(t)
			defer bad.Close()
			c.change(bad, &s)
			if task, err := bad.Create(t.Context(), s); err == nil {
				t.Fatalf("created: %v", task)
			} else {
				t.Log(err)
			}
			if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, s.ID) {
				t.Errorf("list: got %v, %v", ids, err)
			}
			if left := node.daemon.Leftovers(); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
			wantNothing(t, r, s.ID)
		})
	}
}

func TestCreateGivesUp(t *testing.T) {
	r := start(t)
	for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond} {
		s := newSpec(t, r, "sleep", "1000")
		ctx, cancel := context.WithTimeout(t.Context(), after)
		task, err := r.Create(ctx, s)
		cancel()
		if err == nil {
			// It was past the point of no return: then it is whole.
			if st, err := task.Status(t.Context()); err != nil || st.State != runtime.StateCreated {
				t.Errorf("after %s: got %+v, %v", after, st, err)
			}
			continue
		}
		if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, s.ID) {
			t.Errorf("after %s: list: got %v, %v", after, ids, err)
		}
	}
}

func TestCreateOfOneIDAtOnce(t *testing.T) {
	r := start(t)
	other := openRuntime(t) // another process's: the lock of an id does not hold there
	defer other.Close()
	s := newSpec(t, r, "sleep", "1000")
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		won []runtime.Task
	)
	for i := range 8 {
		wg.Go(func() {
			task, err := []*Runtime{r, other}[i%2].Create(t.Context(), s)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won = append(won, task)
			case !errors.Is(err, runtime.ErrExists):
				t.Errorf("got %v, want exists", err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Fatalf("%d have made it", len(won))
	}
	if err := won[0].Start(t.Context()); err != nil {
		t.Error(err)
	}
}
