// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
)

func execIn(t *testing.T, task runtime.Task, spec runtime.ExecSpec, stdio runtime.IO) runtime.Process {
	t.Helper()
	p, err := task.Exec(bounded(t), spec, stdio)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *suite) exec(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "sleep 1000")
	spec.Env = []string{"FROM_SPEC=yes"}
	task := launch(t, r, spec)
	var out, errs buffer
	p := execIn(t, task, runtime.ExecSpec{
		Command: []string{"sh", "-c", "echo $FROM_IMAGE $FROM_SPEC $FROM_EXEC; pwd; echo bad >&2; exit 3"},
		Env:     []string{"FROM_EXEC=yes"},
		Workdir: "/tmp",
	}, runtime.IO{Stdout: &out, Stderr: &errs})
	if p.PID() == 0 || p.PID() == task.PID() || p.ID() == "" {
		t.Errorf("got id %q pid %d", p.ID(), p.PID())
	}
	if exit := wait(t, p); exit.Code != 3 {
		t.Errorf("exit: got %d, want 3", exit.Code)
	}
	if got, want := out.String(), "yes yes yes\n/tmp\n"; got != want {
		t.Errorf("stdout: got %q, want %q", got, want)
	}
	if got, want := errs.String(), "bad\n"; got != want {
		t.Errorf("stderr: got %q, want %q", got, want)
	}
	wantErr(t, "signal after the end", p.Kill(bounded(t), syscall.SIGTERM), runtime.ErrNotRunning)
	wantErr(t, "resize", p.Resize(bounded(t), 1, 1), runtime.ErrNoTerminal)

	_, err := task.Exec(bounded(t), runtime.ExecSpec{Command: []string{"nosuch"}}, runtime.IO{})
	wantErr(t, "exec", err, runtime.ErrCommand)
	_, err = task.Exec(bounded(t), runtime.ExecSpec{}, runtime.IO{})
	wantErr(t, "exec", err, runtime.ErrInvalidSpec)
	wantState(t, task, runtime.StateRunning)
}

// execStreams: every byte arrives, both ways, and the end of the input does.
func (s *suite) execStreams(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "sleep 1000"))
	in := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // more than any pipe holds
	var out buffer
	p := execIn(t, task, runtime.ExecSpec{Command: []string{"cat"}}, runtime.IO{Stdin: bytes.NewReader(in), Stdout: &out})
	if exit := wait(t, p); exit.Code != 0 {
		t.Errorf("exit: got %d, want 0", exit.Code)
	}
	if got := out.String(); got != string(in) {
		t.Errorf("got %d bytes, want %d", len(got), len(in))
	}
	// A reader that fails does not stop the process.
	p = execIn(t, task, runtime.ExecSpec{Command: []string{"cat"}}, runtime.IO{Stdin: bytes.NewReader(in), Stdout: failingWriter{}})
	if exit := wait(t, p); exit.Code != 0 {
		t.Errorf("exit: got %d, want 0", exit.Code)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func (s *suite) execMany(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "sleep 1000"))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			var out buffer
			p, err := task.Exec(bounded(t), runtime.ExecSpec{
				Command: []string{"sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)},
			}, runtime.IO{Stdout: &out})
			if err != nil {
				t.Error(err)
				return
			}
			exit, err := p.Wait(bounded(t))
			if err != nil || exit.Code != uint32(i) || out.String() != fmt.Sprintf("%d\n", i) {
				t.Errorf("exec %d: got %+v, %q, %v", i, exit, out.String(), err)
			}
		})
	}
	wg.Wait()
}

func (s *suite) execTerminal(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "sleep 1000"))
	in, typed := io.Pipe()
	defer typed.Close()
	var out buffer
	p := execIn(t, task, runtime.ExecSpec{
		Command: []string{"sh", "-c", "stty size; echo bad >&2; sleep 0.5; stty size"}, Terminal: true, Rows: 33, Cols: 77,
	}, runtime.IO{Stdin: in, Stdout: &out})
	out.await(t, "33 77")
	if err := p.Resize(bounded(t), 44, 88); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, p); exit.Code != 0 {
		t.Errorf("exit: got %d, want 0", exit.Code)
	}
	got := strings.Fields(out.String())
	if want := "33 77 bad 44 88"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func (s *suite) execKill(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "sleep 1000"))
	p := execIn(t, task, runtime.ExecSpec{Command: []string{"sleep", "1000"}}, runtime.IO{})
	if err := p.Kill(bounded(t), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, p); exit.Code != 143 {
		t.Errorf("exit: got %d, want 143", exit.Code)
	}
	// The end of the task is the end of everything in it.
	p = execIn(t, task, runtime.ExecSpec{Command: []string{"sleep", "1000"}}, runtime.IO{})
	if err := task.Kill(bounded(t), syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, p); exit.Code != 137 {
		t.Errorf("exit: got %d, want 137", exit.Code)
	}
	wait(t, task)
}

func (s *suite) execNotRunning(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "true"))
	wait(t, task)
	_, err := task.Exec(bounded(t), runtime.ExecSpec{Command: []string{"true"}}, runtime.IO{})
	wantErr(t, "exec", err, runtime.ErrNotRunning)
}

// conversation is one Attach.
type conversation struct {
	out, errs buffer
	typed     *io.PipeWriter
	cancel    context.CancelFunc
	done      chan error // depth one: Attach answers once
}

func attach(t *testing.T, task runtime.Task) *conversation {
	t.Helper()
	in, typed := io.Pipe()
	ctx, cancel := context.WithCancel(bounded(t))
	c := &conversation{typed: typed, cancel: cancel, done: make(chan error, 1)}
	go func() { c.done <- task.Attach(ctx, runtime.IO{Stdin: in, Stdout: &c.out, Stderr: &c.errs}) }()
	t.Cleanup(func() {
		cancel()
		typed.Close()
	})
	return c
}

// say types until what it types is heard: an Attach takes a moment to begin.
func (c *conversation) say(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c.typed, text); err != nil {
		t.Fatal(err)
	}
}

func (c *conversation) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-c.done:
		return err
	case <-time.After(patience):
		t.Fatal("attach does not end")
		return nil
	}
}

func (s *suite) attachStdin(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "cat; echo over; echo bad >&2; exit 6")
	spec.Stdin = true
	task := create(t, r, spec)
	c := attach(t, task)
	if err := task.Start(bounded(t)); err != nil {
		t.Fatal(err)
	}
	c.say(t, "hello\n")
	c.out.await(t, "hello\n")
	c.typed.Close()
	if exit := wait(t, task); exit.Code != 6 {
		t.Errorf("exit: got %d, want 6", exit.Code)
	}
	if err := c.wait(t); err != nil {
		t.Errorf("attach: %v", err)
	}
	if got, want := c.out.String(), "hello\nover\n"; got != want {
		t.Errorf("stdout: got %q, want %q", got, want)
	}
	if got, want := c.errs.String(), "bad\n"; got != want {
		t.Errorf("stderr: got %q, want %q", got, want)
	}
	stdout, stderr := output(t, spec.LogDir)
	if stdout != "hello\nover\n" || stderr != "bad\n" {
		t.Errorf("log: got %q and %q", stdout, stderr)
	}
	wantErr(t, "resize", task.Resize(bounded(t), 1, 1), runtime.ErrNoTerminal)
}

func (s *suite) attachTerminal(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "sleep 0.3; stty size; echo bad >&2; cat")
	spec.Terminal = true
	task := create(t, r, spec)
	c := attach(t, task)
	if err := task.Resize(bounded(t), 12, 34); err != nil {
		t.Fatal(err)
	}
	if err := task.Start(bounded(t)); err != nil {
		t.Fatal(err)
	}
	c.out.await(t, "12 34")
	c.out.await(t, "bad")
	c.say(t, "typed\n")
	c.out.await(t, "typed")
	// The end of what is typed is not the end of a terminal.
	c.typed.Close()
	time.Sleep(50 * time.Millisecond)
	wantState(t, task, runtime.StateRunning)
	if err := task.Kill(bounded(t), syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	wait(t, task)
	if err := c.wait(t); err != nil {
		t.Errorf("attach: %v", err)
	}
	if got := c.errs.String(); got != "" {
		t.Errorf("stderr of a terminal: %q", got)
	}
	stdout, _ := output(t, spec.LogDir)
	if !strings.Contains(stdout, "12 34") || !strings.Contains(stdout, "typed") {
		t.Errorf("log: got %q", stdout)
	}
}

func (s *suite) attachSeveral(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "cat")
	spec.Stdin = true
	task := launch(t, r, spec)
	a, b := attach(t, task), attach(t, task)
	// Each has begun when it hears something.
	for !strings.Contains(a.out.String(), "ping") || !strings.Contains(b.out.String(), "ping") {
		a.say(t, "ping\n")
		time.Sleep(10 * time.Millisecond)
	}
	b.say(t, "from b\n")
	a.out.await(t, "from b\n")
	b.out.await(t, "from b\n")
	// One that leaves takes nothing with it.
	b.cancel()
	wantErr(t, "attach", b.wait(t), context.Canceled)
	a.say(t, "still here\n")
	a.out.await(t, "still here\n")
}

// attachAgain: input and output go on after everyone has left.
func (s *suite) attachAgain(t *testing.T) {
	r := s.runtime(t)
	spec := s.sh(t, r, "cat")
	spec.Stdin = true
	task := launch(t, r, spec)
	for _, word := range []string{"first\n", "second\n"} {
		c := attach(t, task)
		c.say(t, word)
		c.out.await(t, word)
		c.cancel()
		wantErr(t, "attach", c.wait(t), context.Canceled)
	}
	if err := task.Kill(bounded(t), syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	wait(t, task)
	if err := attach(t, task).wait(t); err != nil {
		t.Errorf("attach after the end: %v", err)
	}
	if got, _ := output(t, spec.LogDir); got != "first\nsecond\n" {
		t.Errorf("log: got %q", got)
	}
}

func (s *suite) attachAfterRestart(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		t.Run(fmt.Sprintf("terminal=%t", terminal), func(t *testing.T) {
			first, second := s.open(t), s.runtime(t)
			spec := s.sh(t, second, "cat; exit 2")
			spec.Stdin, spec.Terminal = true, terminal
			c := attach(t, launch(t, first, spec))
			c.say(t, "before\n")
			c.out.await(t, "before")
			c.cancel()
			_ = c.wait(t)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			task, err := second.Find(bounded(t), spec.ID)
			if err != nil {
				t.Fatal(err)
			}
			c = attach(t, task)
			c.say(t, "after\n")
			c.out.await(t, "after")
			if terminal {
				if err := task.Resize(bounded(t), 20, 30); err != nil {
					t.Error(err)
				}
				if err := task.Kill(bounded(t), syscall.SIGKILL, true); err != nil {
					t.Fatal(err)
				}
				wait(t, task)
			} else {
				c.typed.Close()
				if exit := wait(t, task); exit.Code != 2 {
					t.Errorf("exit: got %d, want 2", exit.Code)
				}
			}
			if err := c.wait(t); err != nil {
				t.Errorf("attach: %v", err)
			}
			stdout, _ := output(t, spec.LogDir)
			if !strings.Contains(stdout, "before") || !strings.Contains(stdout, "after") {
				t.Errorf("log: got %q", stdout)
			}
		})
	}
}

func (s *suite) attachNeedsStreams(t *testing.T) {
	r := s.runtime(t)
	task := launch(t, r, s.sh(t, r, "sleep 1000"))
	wantErr(t, "attach", task.Attach(bounded(t), runtime.IO{}), runtime.ErrNoAttach)
}
