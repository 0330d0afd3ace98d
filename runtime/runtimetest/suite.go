// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

// patience is the longest that anything in the suite may take: it is reached
// only when something hangs.
const patience = 60 * time.Second

// Run checks a runtime against what package runtime promises. Every call of
// open answers another runtime on the same node, as processes that come after
// each other have it; the suite closes them.
func Run(t *testing.T, open func(t *testing.T) runtime.Runtime) {
	s := &suite{open: open, parent: fmt.Sprintf("bhtest-%d-suite", os.Getpid())}
	t.Cleanup(func() { s.removeCgroups(t) })
	r := s.runtime(t)
	if _, err := r.Image(t.Context(), BusyboxRef); errors.Is(err, runtime.ErrImageNotFound) {
		if _, err := r.Import(t.Context(), bytes.NewReader(BusyboxArchive(t))); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"ExitAndLog", s.exitAndLog},
		{"CreatedIsNotStarted", s.createdIsNotStarted},
		{"KillBeforeStart", s.killBeforeStart},
		{"RefusedSpecs", s.refusedSpecs},
		{"ImageDefaults", s.imageDefaults},
		{"Exists", s.exists},
		{"Signals", s.signals},
		{"WaitMany", s.waitMany},
		{"WaitGivesUp", s.waitGivesUp},
		{"Remove", s.remove},
		{"Adopt", s.adopt},
		{"AdoptEnded", s.adoptEnded},
		{"Exec", s.exec},
		{"ExecStreams", s.execStreams},
		{"ExecMany", s.execMany},
		{"ExecTerminal", s.execTerminal},
		{"ExecKill", s.execKill},
		{"ExecNotRunning", s.execNotRunning},
		{"AttachStdin", s.attachStdin},
		{"AttachTerminal", s.attachTerminal},
		{"AttachSeveral", s.attachSeveral},
		{"AttachAgain", s.attachAgain},
		{"AttachAfterRestart", s.attachAfterRestart},
		{"AttachNeedsStreams", s.attachNeedsStreams},
		{"Images", s.images},
		{"ImportDamaged", s.importDamaged},
	} {
		t.Run(c.name, c.run)
	}
}

type suite struct {
	open   func(*testing.T) runtime.Runtime
	parent string
	n      atomic.Int64
}

func (s *suite) runtime(t *testing.T) runtime.Runtime {
	t.Helper()
	r := s.open(t)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

// spec answers a spec with its own id. The test's end removes what came of it.
func (s *suite) spec(t *testing.T, r runtime.Runtime, command ...string) runtime.Spec {
	t.Helper()
	id := fmt.Sprintf("s%d-%d", os.Getpid(), s.n.Add(1))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := r.Remove(ctx, id); err != nil {
			t.Errorf("remove %s: %v", id, err)
		}
	})
	return runtime.Spec{
		ID: id, Image: BusyboxRef, Command: command,
		CgroupPath: s.parent + "/" + id,
		LogDir:     filepath.Join(t.TempDir(), "logs"),
	}
}

func (s *suite) sh(t *testing.T, r runtime.Runtime, script string) runtime.Spec {
	t.Helper()
	return s.spec(t, r, "sh", "-c", script)
}

// removeCgroups removes what is left of the suite's own cgroup: the leaves are
// the runtime's to remove.
func (s *suite) removeCgroups(t *testing.T) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(pattern + s.parent)
		for _, d := range dirs {
			if err := os.Remove(d); err != nil {
				t.Errorf("cgroup left over: %v", err)
			}
		}
	}
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func create(t *testing.T, r runtime.Runtime, s runtime.Spec) runtime.Task {
	t.Helper()
	task, err := r.Create(bounded(t), s)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func launch(t *testing.T, r runtime.Runtime, s runtime.Spec) runtime.Task {
	t.Helper()
	task := create(t, r, s)
	if err := task.Start(bounded(t)); err != nil {
		t.Fatal(err)
	}
	return task
}

func wait(t *testing.T, task interface {
	Wait(context.Context) (runtime.Exit, error)
},
) runtime.Exit {
	t.Helper()
	exit, err := task.Wait(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	return exit
}

func wantState(t *testing.T, task runtime.Task, want runtime.State) runtime.Status {
	t.Helper()
	st, err := task.Status(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if st.State != want {
		t.Fatalf("state: got %s, want %s", st.State, want)
	}
	return st
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// output answers a task's log. It is complete after Remove.
func output(t *testing.T, dir string) (stdout, stderr string) {
	t.Helper()
	var o, e bytes.Buffer
	if err := logs.Copy(t.Context(), dir, logs.Options{}, &o, &e); err != nil {
		t.Fatal(err)
	}
	return o.String(), e.String()
}

// awaitLog waits until a task has logged a line that holds text.
func awaitLog(t *testing.T, dir, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	found := errors.New("found")
	err := logs.Read(ctx, dir, logs.Options{Follow: true}, func(l logs.Line) error {
		if bytes.Contains(l.Text, []byte(text)) {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		t.Fatalf("no %q in the log: %v", text, err)
	}
}

func (s *suite) exitAndLog(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "echo one; echo two >&2; printf unended; exit 7")
	task := launch(t, r, spec)
	if got := wait(t, task); got.Code != 7 || time.Since(got.Time) > patience || got.OOMKilled {
		t.Errorf("exit: got %+v, want code 7 just now", got)
	}
	if st := wantState(t, task, runtime.StateStopped); st.Exit.Code != 7 || st.PID != 0 && st.PID != task.PID() {
		t.Errorf("status: got %+v", st)
	}
	if err := r.Remove(bounded(t), spec.ID); err != nil {
		t.Fatal(err)
	}
	stdout, stderr := output(t, spec.LogDir)
	if want := "one\nunended"; stdout != want {
		t.Errorf("stdout: got %q, want %q", stdout, want)
	}
	if want := "two\n"; stderr != want {
		t.Errorf("stderr: got %q, want %q", stderr, want)
	}
}

func (s *suite) createdIsNotStarted(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "echo ran")
	task := create(t, r, spec)
	if task.ID() != spec.ID || task.PID() == 0 {
		t.Errorf("got id %s pid %d", task.ID(), task.PID())
	}
	if st := wantState(t, task, runtime.StateCreated); st.PID != task.PID() {
		t.Errorf("pid: got %d, want %d", st.PID, task.PID())
	}
	if stdout, _ := output(t, spec.LogDir); stdout != "" {
		t.Errorf("output before the start: %q", stdout)
	}
	if err := task.Start(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 0 {
		t.Errorf("exit: got %d, want 0", exit.Code)
	}
	if err := task.Start(bounded(t)); err == nil {
		t.Error("a second start succeeds")
	}
}

func (s *suite) killBeforeStart(t *testing.T) {
	r := s.runtime(t)
	task := create(t, r, s.sh(t, r, "echo ran"))
	if err := task.Kill(bounded(t), syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 137 {
		t.Errorf("exit: got %d, want 137", exit.Code)
	}
}

func (s *suite) refusedSpecs(t *testing.T) {
	r := s.runtime(t)
	for _, c := range []struct {
		name   string
		change func(*runtime.Spec)
		want   error
	}{
		{"no image of that name", func(s *runtime.Spec) { s.Image = "docker.io/library/nosuch:1" }, runtime.ErrImageNotFound},
		{"no such command", func(s *runtime.Spec) { s.Command = []string{"nosuch"} }, runtime.ErrCommand},
		{"no id", func(s *runtime.Spec) { s.ID = "" }, runtime.ErrInvalidSpec},
		{"path in id", func(s *runtime.Spec) { s.ID = "../x" }, runtime.ErrInvalidSpec},
		{"no cgroup", func(s *runtime.Spec) { s.CgroupPath = "" }, runtime.ErrInvalidSpec},
		{"cgroup outside", func(s *runtime.Spec) { s.CgroupPath = "a/../../b" }, runtime.ErrInvalidSpec},
		{"no log directory", func(s *runtime.Spec) { s.LogDir = "" }, runtime.ErrInvalidSpec},
		{"negative limit", func(s *runtime.Spec) { s.MemoryBytes = -1 }, runtime.ErrInvalidSpec},
		{"variable without name", func(s *runtime.Spec) { s.Env = []string{"=x"} }, runtime.ErrInvalidSpec},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := s.spec(t, r, "true")
			id := spec.ID
			c.change(&spec)
			_, err := r.Create(bounded(t), spec)
			wantErr(t, "create", err, c.want)
			left, err := r.List(bounded(t))
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(left, id) {
				t.Errorf("something of %s is left", id)
			}
		})
	}
}

func (s *suite) imageDefaults(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "echo $FROM_IMAGE $ADDED; pwd")
	spec.Env = []string{"ADDED=too"}
	spec.Workdir = "/tmp"
	wait(t, launch(t, r, spec))
	if err := r.Remove(bounded(t), spec.ID); err != nil {
		t.Fatal(err)
	}
	if got, _ := output(t, spec.LogDir); got != "yes too\n/tmp\n" {
		t.Errorf("got %q", got)
	}
}

func (s *suite) exists(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "sleep 1000")
	task := launch(t, r, spec)
	_, err := r.Create(bounded(t), spec)
	wantErr(t, "create again", err, runtime.ErrExists)
	wantState(t, task, runtime.StateRunning)
}

func (s *suite) signals(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "trap 'exit 9' TERM; echo ready; sleep 1000 & wait")
	task := launch(t, r, spec)
	awaitLog(t, spec.LogDir, "ready")
	if err := task.Kill(bounded(t), syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 9 {
		t.Errorf("handled signal: got exit %d, want 9", exit.Code)
	}
	wantErr(t, "signal after the end", task.Kill(bounded(t), syscall.SIGTERM, false), runtime.ErrNotRunning)

	// The kernel keeps signals without a handler from a namespace's first
	// process.
	task = launch(t, r, s.sh(t, r, "sleep 1000"))
	if err := task.Kill(bounded(t), syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	wantState(t, task, runtime.StateRunning)
	if err := task.Kill(bounded(t), syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 137 {
		t.Errorf("kill: got exit %d, want 137", exit.Code)
	}
}

func (s *suite) waitMany(t *testing.T) {
	r := s.runtime(t)
	task := create(t, r, s.sh(t, r, "exit 3"))
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if exit, err := task.Wait(bounded(t)); err != nil || exit.Code != 3 {
				t.Errorf("wait: got %+v, %v", exit, err)
			}
		})
	}
	if err := task.Start(bounded(t)); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

func (s *suite) waitGivesUp(t *testing.T) {
	r := s.open(t)
	task := launch(t, r, s.sh(t, s.runtime(t), "sleep 1000"))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := task.Wait(ctx)
	wantErr(t, "wait", err, context.DeadlineExceeded)

	failed := make(chan error, 1)
	go func() {
		_, err := task.Wait(context.WithoutCancel(t.Context()))
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		if err == nil {
			t.Error("wait succeeds after close")
		}
	case <-time.After(patience):
		t.Fatal("wait hangs after close")
	}
}

func (s *suite) remove(t *testing.T) {
	r := s.runtime(t)
	if err := r.Remove(bounded(t), "neverwas"); err != nil {
		t.Errorf("remove of nothing: %v", err)
	}
	_, err := r.Find(bounded(t), "neverwas")
	wantErr(t, "find nothing", err, runtime.ErrNotFound)
	for _, started := range []bool{false, true} {
		spec := s.sh(t, r, "sleep 1000")
		task := create(t, r, spec)
		if started {
			if err := task.Start(bounded(t)); err != nil {
				t.Fatal(err)
			}
		}
		if ids, err := r.List(bounded(t)); err != nil || !slices.Contains(ids, spec.ID) {
			t.Errorf("list: got %v, %v", ids, err)
		}
		for range 2 {
			if err := r.Remove(bounded(t), spec.ID); err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.Find(bounded(t), spec.ID)
		wantErr(t, "find", err, runtime.ErrNotFound)
		_, err = task.Status(bounded(t))
		wantErr(t, "status", err, runtime.ErrNotFound)
		if exit := wait(t, task); exit.Code != 137 {
			t.Errorf("exit: got %d, want 137", exit.Code)
		}
		if ids, err := r.List(bounded(t)); err != nil || slices.Contains(ids, spec.ID) {
			t.Errorf("list: got %v, %v", ids, err)
		}
	}
}

func (s *suite) adopt(t *testing.T) {
	first, second := s.open(t), s.runtime(t)
	spec := s.sh(t, second, "trap 'exit 5' TERM; echo ready; sleep 1000 & wait")
	made := launch(t, first, spec)
	awaitLog(t, spec.LogDir, "ready")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	task, err := second.Find(bounded(t), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if task.ID() != spec.ID || task.PID() != made.PID() {
		t.Errorf("got %s pid %d, want pid %d", task.ID(), task.PID(), made.PID())
	}
	wantState(t, task, runtime.StateRunning)
	if err := task.Kill(bounded(t), syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 5 {
		t.Errorf("exit: got %d, want 5", exit.Code)
	}
}

func (s *suite) adoptEnded(t *testing.T) {
	first, second := s.open(t), s.runtime(t)
	spec := s.sh(t, second, "exit 4")
	task := launch(t, first, spec)
	want := wait(t, task)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	task, err := second.Find(bounded(t), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	got := wait(t, task)
	if got.Code != 4 || !got.Time.Equal(want.Time) {
		t.Errorf("exit: got %+v, want %+v", got, want)
	}
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// await waits until what was written holds text.
func (b *buffer) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if strings.Contains(b.String(), text) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("no %q in %q", text, b.String())
		}
	}
}

func (s *suite) images(t *testing.T) {
	r := s.runtime(t)
	img, err := r.Image(bounded(t), "busybox")
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != BusyboxRef || !strings.HasPrefix(img.Digest, "sha256:") || img.SizeBytes <= 0 {
		t.Errorf("got %+v", img)
	}
	all, err := r.Images(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(all, func(i runtime.Image) bool { return i.Name == img.Name && i.Digest == img.Digest }) {
		t.Errorf("not listed: %+v", all)
	}
	_, err = r.Image(bounded(t), "nosuch")
	wantErr(t, "image", err, runtime.ErrImageNotFound)
	_, err = r.Image(bounded(t), "NOT a name!")
	wantErr(t, "image", err, runtime.ErrImageNotFound)
}

func (s *suite) importDamaged(t *testing.T) {
	r := s.runtime(t)
	whole := OCIArchive(t, BusyboxImage(t), map[string]string{"io.containerd.image.name": "docker.io/library/damaged:1"})
	for name, b := range map[string][]byte{
		"empty":     nil,
		"text":      []byte("not an archive, whatever it may look like"),
		"truncated": whole[:len(whole)/2],
		"no tail":   whole[:len(whole)/1024*1024-4096],
	} {
		_, err := r.Import(bounded(t), bytes.NewReader(b))
		wantErr(t, name, err, runtime.ErrInvalidArchive)
	}
	_, err := r.Image(bounded(t), "damaged:1")
	wantErr(t, "image of a damaged archive", err, runtime.ErrImageNotFound)

	broken := errors.New("connection reset")
	_, err = r.Import(bounded(t), io.MultiReader(bytes.NewReader(whole[:4096]), &failing{broken}))
	wantErr(t, "import from a broken reader", err, broken)
	if errors.Is(err, runtime.ErrInvalidArchive) {
		t.Error("a broken reader makes an invalid archive")
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }
