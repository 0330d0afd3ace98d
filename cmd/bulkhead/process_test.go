// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// TestMain makes the test binary the program when it is asked to be, so that
// signals, pipes and terminals are real.
func TestMain(m *testing.M) {
	if os.Getenv("BULKHEAD_TEST_AS_PROGRAM") == "1" {
		main()
	}
	os.Exit(m.Run())
}

// program prepares a real process of the program that talks to f.
func (f *fakeNode) program(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "BULKHEAD_TEST_AS_PROGRAM=1", "BULKHEAD_SOCKET="+f.sock, "BULKHEAD_TENANT=acme", "TERM=test")
	f.t.Cleanup(func() {
		if cmd.Process != nil && cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return cmd
}

func exitCode(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			return 1000 + int(ws.Signal())
		}
		return exit.ExitCode()
	}
	t.Fatal(err)
	return -1
}

// eventually waits for ok, which is called with f.mu held.
func (f *fakeNode) eventually(what string, ok func() bool) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if f.until(ctx, ok) != nil {
		f.t.Fatalf("not in time: %s", what)
	}
}

func (f *fakeNode) graces() []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.stops)
}

func TestSignalsStopAndKill(t *testing.T) {
	for _, test := range []struct {
		name, script string
		signals      int
		graces       []int64
		code         int
		stderr       string
	}{
		{"once", "echo ready; sleep", 1, []int64{0}, 143, "bulkhead run: stopped by uid:1000\n"},
		{"graceful", "echo ready; trap 0; sleep", 1, []int64{0}, 137, "bulkhead run: stopped by uid:1000\n"},
		{"twice", "echo ready; trap -1; sleep", 2, []int64{0, -1}, 137, "bulkhead run: stopped by uid:1000\n"},
	} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			t.Run(test.name+" "+sig.String(), func(t *testing.T) {
				f := newFakeNode(t)
				cmd := f.program("run", "--rm", "alpine", "sh", "-c", test.script)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
					t.Fatalf("got %q, want ready", line)
				}
				for n := range test.signals {
					cmd.Process.Signal(sig)
					f.eventually("stop request", func() bool { return len(f.stops) > n })
				}
				if got := exitCode(t, cmd.Wait()); got != test.code {
					t.Errorf("exit code: got %d, want %d", got, test.code)
				}
				if got := f.graces(); !slices.Equal(got, test.graces) {
					t.Errorf("graces: got %v, want %v", got, test.graces)
				}
				if got := stderr.String(); got != test.stderr {
					t.Errorf("stderr: got %q, want %q", got, test.stderr)
				}
				if n := f.live(); n != 0 {
					t.Errorf("--rm left %d sandboxes", n)
				}
			})
		}
	}
}

// A sandbox whose start was interrupted must not run on unseen.
func TestSignalWhileStarting(t *testing.T) {
	f := newFakeNode(t)
	gate := make(chan struct{})
	f.set(func() { f.gate = gate })
	cmd := f.program("run", "alpine", "sleep")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.eventually("Create", func() bool { return f.creates == 1 })
	cmd.Process.Signal(syscall.SIGTERM)
	lines := bufio.NewReader(stderr)
	if line, _ := lines.ReadString('\n'); !strings.Contains(line, "will stop it as soon as it has started") {
		t.Fatalf("got %q", line)
	}
	close(gate)
	rest, _ := io.ReadAll(lines)
	if got, want := string(rest), "bulkhead run: stopped by uid:1000\n"; got != want {
		t.Errorf("stderr: got %q, want %q", got, want)
	}
	if got := exitCode(t, cmd.Wait()); got != 143 {
		t.Errorf("exit code: got %d, want 143", got)
	}
	if got := f.graces(); !slices.Equal(got, []int64{0}) {
		t.Errorf("graces: got %v, want [0]", got)
	}
}

func TestReaderGoesAway(t *testing.T) {
	t.Run("run", func(t *testing.T) {
		f := newFakeNode(t)
		cmd := f.program("run", "--rm", "alpine", "sh", "-c", "flood 1; hold; flood 100; sleep")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		bufio.NewReader(out).ReadString('\n')
		out.Close()
		close(f.held)
		if got := exitCode(t, cmd.Wait()); got != exitPipe {
			t.Errorf("exit code: got %d, want %d", got, exitPipe)
		}
		if got := f.graces(); !slices.Equal(got, []int64{0}) {
			t.Errorf("graces: got %v, want [0]", got)
		}
		if n := f.live(); n != 0 {
			t.Errorf("--rm left %d sandboxes", n)
		}
	})
	t.Run("ls", func(t *testing.T) {
		f := newFakeNode(t)
		cmd := f.program("ls")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out.Close()
		if got := exitCode(t, cmd.Run()); got != 1000+int(syscall.SIGPIPE) {
			t.Errorf("got %d, want an end by SIGPIPE", got)
		}
		if stderr.Len() != 0 {
			t.Errorf("stderr: %s", &stderr)
		}
	})
	t.Run("exec", func(t *testing.T) {
		f := newFakeNode(t)
		runHere(t, f, 0, "run", "-d", "--name", "a", "alpine", "sleep")
		cmd := f.program("exec", "-i", "a", "sh", "-c", "flood 1; read; flood 50; exit 0")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		bufio.NewReader(out).ReadString('\n')
		out.Close()
		io.WriteString(in, "go\n")
		if got := exitCode(t, cmd.Wait()); got != exitPipe {
			t.Errorf("exit code: got %d, want %d", got, exitPipe)
		}
	})
}

func TestFullDisk(t *testing.T) {
	f := newFakeNode(t)
	for _, args := range [][]string{{"ls"}, {"node"}, {"version"}, {"ls", "--help"}, {"run", "alpine", "sh", "-c", "echo x; sleep"}} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Skip(err)
		}
		cmd := f.program(args...)
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = full, &stderr
		code := exitCode(t, cmd.Run())
		full.Close()
		if code != exitFailure || !strings.Contains(stderr.String(), "no space left on device") {
			t.Errorf("%v: exit %d, stderr %q", args, code, &stderr)
		}
	}
	if got := f.graces(); !slices.Equal(got, []int64{0}) {
		t.Errorf("graces: got %v, want [0]: a sandbox whose output is lost must not run on", got)
	}
}

func TestExecPassesSignalsOn(t *testing.T) {
	f := newFakeNode(t)
	runHere(t, f, 0, "run", "-d", "--name", "a", "alpine", "sleep")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGUSR1} {
		cmd := f.program("exec", "a", "sh", "-c", "echo ready; sleep")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		bufio.NewReader(out).ReadString('\n')
		cmd.Process.Signal(sig)
		if got := exitCode(t, cmd.Wait()); got != 128+int(sig) {
			t.Errorf("%s: got %d, want %d", sig, got, 128+int(sig))
		}
	}
}

func TestSocketNotAllowed(t *testing.T) {
	need.Root(t)
	f := newFakeNode(t)
	// A place that another user can reach, with the program and a socket that
	// he may not use.
	dir, err := os.MkdirTemp("", "bulkhead-cli")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "bulkhead"), program, 0o755), os.Chmod(dir, 0o755),
		os.Rename(f.sock, filepath.Join(dir, "agent.sock")), os.Chmod(filepath.Join(dir, "agent.sock"), 0o660)); err != nil {
		t.Fatal(err)
	}
	cmd := f.program("--socket", filepath.Join(dir, "agent.sock"), "ls")
	cmd.Path, cmd.Dir = filepath.Join(dir, "bulkhead"), "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65533, Gid: 65533}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	code := exitCode(t, cmd.Run())
	want := fmt.Sprintf("bulkhead ls: not allowed to use %s/agent.sock: you are uid 65533 and need to be root or in group root (%[1]s/agent.sock has mode 0660)\n", dir)
	if code != exitFailure || stderr.String() != want {
		t.Errorf("exit %d, stderr\n%swant\n%s", code, &stderr, want)
	}
}

// runHere runs the program in this process against f and answers its standard
// output.
func runHere(t *testing.T, f *fakeNode, code int, args ...string) string {
	t.Helper()
	t.Setenv("BULKHEAD_SOCKET", f.sock)
	t.Setenv("BULKHEAD_TENANT", "acme")
	var stdout, stderr bytes.Buffer
	if got := run(args, strings.NewReader(""), &stdout, &stderr); got != code {
		t.Fatalf("%v: exit %d, want %d; stderr: %s", args, got, code, &stderr)
	}
	return stdout.String()
}
