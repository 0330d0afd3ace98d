// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

func execOut(t testing.TB, task runtime.Task, spec runtime.ExecSpec) (uint32, string) {
	t.Helper()
	var out bytes.Buffer
	p, err := task.Exec(t.Context(), spec, runtime.IO{Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	return wait(t, p).Code, out.String()
}

// TestExecIsConfined: an exec'd process has no more than the command.
func TestExecIsConfined(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	s.User = "agent"
	task := launch(t, r, s)
	for user, caps := range map[string]string{"": "0000000000000000", "root": "00000000000004fb", "agent": "0000000000000000"} {
		_, out := execOut(t, task, runtime.ExecSpec{Command: []string{"cat", "/proc/self/status"}, User: user})
		st := procStatus(out)
		for k, want := range map[string]string{"CapEff": caps, "CapPrm": caps, "CapBnd": "00000000000004fb", "CapInh": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"} {
			if st[k] != want {
				t.Errorf("user %q: %s: got %s, want %s", user, k, st[k], want)
			}
		}
	}
	for user, home := range map[string]string{"": "/home/agent", "root": "/root", "77": "/"} {
		if _, out := execOut(t, task, runtime.ExecSpec{Command: []string{"sh", "-c", "echo $HOME"}, User: user}); out != home+"\n" {
			t.Errorf("home of %q: got %q, want %s", user, out, home)
		}
	}
	_, out := execOut(t, task, runtime.ExecSpec{Command: []string{"id"}})
	if !strings.HasPrefix(out, "uid=1000(agent) gid=1000(agent)") {
		t.Errorf("got %q", out)
	}
}

// TestExecUserOfHostileFiles: whatever a tenant makes of its passwd file, the
// look-up ends inside and soon.
func TestExecUserOfHostileFiles(t *testing.T) {
	r := start(t)
	task := launch(t, r, newSpec(t, r, "sleep", "1000"))
	for _, c := range []struct{ name, script, user, want string }{
		{"device", "ln -sf /dev/zero /etc/passwd", "agent", ""},
		{"FIFO", "rm /etc/passwd; mkfifo /etc/passwd", "agent", ""},
		{"directory", "rm -f /etc/passwd; mkdir /etc/passwd", "agent", ""},
		{"large", "rm -rf /etc/passwd; head -c 3000000 /dev/zero > /etc/passwd", "agent", ""},
		{"loop", "rm -f /etc/passwd; ln -s passwd /etc/passwd", "agent", ""},
		{"outside", "rm -f /etc/passwd; ln -s ../../../../../../../../inner /etc/passwd; echo x:x:77:77::/:/bin/sh > /inner", "x", "uid=77"},
		{"magic link", "rm -f /etc/passwd; ln -s /proc/self/root/etc/shadow /etc/passwd", "agent", ""},
		{"missing", "rm -f /etc/passwd", "agent", ""},
		{"number", "rm -f /etc/passwd", "88:99", "uid=88 gid=99"},
	} {
		if code, _ := execOut(t, task, runtime.ExecSpec{Command: []string{"sh", "-c", c.script}}); code != 0 {
			t.Fatalf("%s: exit %d", c.name, code)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		var out bytes.Buffer
		p, err := task.Exec(ctx, runtime.ExecSpec{Command: []string{"id"}, User: c.user}, runtime.IO{Stdout: &out})
		cancel()
		switch {
		case err == nil:
			wait(t, p)
			if c.want == "" || !strings.HasPrefix(out.String(), c.want) {
				t.Errorf("%s: got %q, want %q", c.name, out.String(), c.want)
			}
		case c.want != "":
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestExecLeavesChild: what an exec'd process leaves behind may keep its pipes,
// not its caller.
func TestExecLeavesChild(t *testing.T) {
	r := start(t)
	task := launch(t, r, newSpec(t, r, "sleep", "1000"))
	begin := time.Now()
	code, out := execOut(t, task, runtime.ExecSpec{Command: []string{"sh", "-c", "sleep 1000 & echo started"}})
	if code != 0 || out != "started\n" {
		t.Errorf("got exit %d, %q", code, out)
	}
	if took := time.Since(begin); took < outputGrace || took > outputGrace+20*time.Second {
		t.Errorf("took %s, want about %s", took, outputGrace)
	}
}

// TestExecOfDeadCaller: the next Find ends what the last process has left.
func TestExecOfDeadCaller(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	first := openRuntime(t)
	task := launch(t, first, s)
	p, err := task.Exec(t.Context(), runtime.ExecSpec{Command: []string{"yes"}}, runtime.IO{})
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(t.Context()); err == nil {
		t.Error("wait succeeds after close")
	}
	if !alive(p.PID()) {
		t.Fatal("the exec'd process ended with its caller: this tests nothing")
	}
	found, err := r.Find(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the exec'd process ends", func() bool { return !alive(p.PID()) })
	if entries, err := os.ReadDir(filepath.Join(r.fifoDir(s.ID), execDir)); err != nil || len(entries) > 0 {
		t.Errorf("FIFOs left: %v, %v", entries, err)
	}
	if code, _ := execOut(t, found, runtime.ExecSpec{Command: []string{"true"}}); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestExecLeavesNothing: nothing of a finished exec is left, in containerd or
// on disk.
func TestExecLeavesNothing(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sleep", "1000")
	task := launch(t, r, s)
	p, err := task.Exec(t.Context(), runtime.ExecSpec{Command: []string{"true"}}, runtime.IO{})
	if err != nil {
		t.Fatal(err)
	}
	wait(t, p)
	if _, err := r.state(t.Context(), s.ID, p.ID()); !isNotFound(err) {
		t.Errorf("containerd still has it: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Join(r.fifoDir(s.ID), execDir)); err != nil || len(entries) > 0 {
		t.Errorf("FIFOs left: %v, %v", entries, err)
	}
}

// TestOutputWaitsForRelay: what an interactive command writes while no process
// of ours runs is not lost.
func TestOutputWaitsForRelay(t *testing.T) {
	r := start(t)
	const lines = 60_000 // more than the FIFO holds
	s := newSpec(t, r, "sh", "-c", "read go; seq "+strconv.Itoa(lines)+" ; sleep 0.2; echo over; sleep 1000")
	s.Stdin = true
	s.LogMaxBytes = 100 << 20
	first := openRuntime(t)
	task := launch(t, first, s)
	go func() { _ = task.Attach(t.Context(), runtime.IO{Stdin: strings.NewReader("go\n")}) }()
	time.Sleep(100 * time.Millisecond)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if _, err := r.Find(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	next := 1
	over := errors.New("over")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	text := ""
	err := logs.Read(ctx, s.LogDir, logs.Options{Follow: true}, func(l logs.Line) error {
		text += string(l.Text)
		if l.Partial {
			return nil
		}
		line := text
		text = ""
		if line == "over" {
			return over
		}
		if line != strconv.Itoa(next) {
			t.Fatalf("got %q, want %d", line, next)
		}
		next++
		return nil
	})
	if !errors.Is(err, over) || next != lines+1 {
		t.Errorf("got %d lines, %v", next-1, err)
	}
}

// TestSlowReaderIsCutOff: one that takes nothing holds the command for a while,
// not for ever.
func TestSlowReaderIsCutOff(t *testing.T) {
	r := start(t)
	r.slowReader = 300 * time.Millisecond
	s := newSpec(t, r, "sh", "-c", "yes "+strings.Repeat("x", 300)+" | head -c 5000000; echo over; sleep 1000")
	s.Stdin = true
	s.LogFiles = 2
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	stuck := &stuckWriter{release: make(chan struct{})}
	slow := make(chan error, 1)
	go func() { slow <- task.Attach(t.Context(), runtime.IO{Stdout: stuck}) }()
	quick := make(chan error, 1)
	var out lastLine
	ctx, cancel := context.WithCancel(t.Context())
	go func() { quick <- task.Attach(ctx, runtime.IO{Stdout: &out}) }()
	time.Sleep(50 * time.Millisecond)
	if err := task.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	over := errors.New("over")
	bounded, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	err = logs.Read(bounded, s.LogDir, logs.Options{Follow: true}, func(l logs.Line) error {
		if strings.HasSuffix(string(l.Text), "over") {
			return over
		}
		return nil
	})
	close(stuck.release)
	if !errors.Is(err, over) {
		t.Fatal(err)
	}
	if err := <-slow; !errors.Is(err, runtime.ErrSlowReader) {
		t.Errorf("slow reader: got %v", err)
	}
	cancel()
	if err := <-quick; !errors.Is(err, context.Canceled) {
		t.Errorf("quick reader: got %v", err)
	}
}

// stuckWriter takes its first piece only when released.
type stuckWriter struct{ release chan struct{} }

func (w *stuckWriter) Write(p []byte) (int, error) {
	<-w.release
	return len(p), nil
}

type lastLine struct{ n int }

func (l *lastLine) Write(p []byte) (int, error) {
	l.n += len(p)
	return len(p), nil
}
