// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/runtime/logs"
	"github.com/bulkheadhq/bulkhead/test/need"
)

var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "bulkhead-log-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "bulkhead-log")
		build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// logger is a running bulkhead-log, with the shim's ends of its pipes.
type logger struct {
	cmd      *exec.Cmd
	out, err *os.File
	errText  bytes.Buffer
}

// startLogger does what the shim does: it starts the program and waits for its
// byte.
func startLogger(t testing.TB, args ...string) (*logger, error) {
	t.Helper()
	l := &logger{cmd: exec.Command(program, args...)}
	var files []*os.File
	pipe := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, r, w)
		return r, w
	}
	outR, outW := pipe()
	errR, errW := pipe()
	readyR, readyW := pipe()
	l.out, l.err = outW, errW
	l.cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	l.cmd.Env = []string{"CONTAINER_ID=x", "CONTAINER_NAMESPACE=bulkhead"}
	l.cmd.Stderr = &l.errText
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = l.cmd.Process.Kill()
		_ = l.cmd.Wait()
		for _, f := range files {
			f.Close()
		}
	})
	for _, f := range []*os.File{outR, errR, readyW} {
		f.Close()
	}
	b := make([]byte, 2)
	n, err := readyR.Read(b)
	if n != 1 {
		return l, fmt.Errorf("not ready: %d bytes, %w", n, err)
	}
	if _, err := readyR.Read(b); !errors.Is(err, io.EOF) {
		t.Errorf("descriptor 5 stays open: %v", err)
	}
	return l, nil
}

func (l *logger) wait(t testing.TB, limit time.Duration) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- l.cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		t.Fatal("the logger does not end")
		return nil
	}
}

func text(t testing.TB, dir string) (string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	if err := logs.Copy(t.Context(), dir, logs.Options{}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String()
}

func TestLogs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	l, err := startLogger(t, "files", "3", "dir", dir, "max", "1000000")
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("z", 50_000)
	fmt.Fprintf(l.out, "one\n%s\n", long)
	fmt.Fprint(l.err, "two\n")
	fmt.Fprint(l.out, "no newline")

	// It appears in the log though the pipe stays open.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	seen := errors.New("seen")
	err = logs.Read(ctx, dir, logs.Options{Follow: true}, func(line logs.Line) error {
		if line.Partial && string(line.Text) == "no newline" {
			return seen
		}
		return nil
	})
	if !errors.Is(err, seen) {
		t.Fatal(err)
	}
	l.out.Close()
	l.err.Close()
	if err := l.wait(t, 30*time.Second); err != nil {
		t.Errorf("exit: %v: %s", err, &l.errText)
	}
	out, errs := text(t, dir)
	if want := "one\n" + long + "\nno newline"; out != want {
		t.Errorf("stdout: got %.60q, want %.60q", out, want)
	}
	if errs != "two\n" {
		t.Errorf("stderr: got %q", errs)
	}
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{{}, {"dir"}, {"max", "1"}, {"dir", "/x", "max", "much"}, {"dir", "/x", "colour", "1"}} {
		l, err := startLogger(t, args...)
		if err == nil {
			t.Errorf("%q: ready", args)
		}
		var exit *exec.ExitError
		if err := l.wait(t, 30*time.Second); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("%q: got %v, want exit 1", args, err)
		}
		if !strings.HasPrefix(l.errText.String(), "bulkhead-log: ") {
			t.Errorf("%q: said %q", args, &l.errText)
		}
	}
}

// TestSignals: only SIGTERM ends it, after what is in the pipes is written, and
// even if somebody holds them.
func TestSignals(t *testing.T) {
	dir := t.TempDir()
	l, err := startLogger(t, "dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if err := l.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprint(l.out, "after the signals\n")
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(l.out, "last words")
	if err := l.wait(t, 2*grace); err != nil {
		t.Errorf("exit: %v", err)
	}
	if out, _ := text(t, dir); out != "after the signals\nlast words" {
		t.Errorf("got %q", out)
	}
}

// TestDiskFull: the command's writes never wait for the disk.
func TestDiskFull(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	l, err := startLogger(t, "dir", dir, "max", "100000000", "files", "2")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.out.SetWriteDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	line := bytes.Repeat([]byte("x"), 1023)
	for range 20_000 {
		if _, err := l.out.Write(append(line, '\n')); err != nil {
			t.Fatalf("the command waits: %v", err)
		}
	}
	// All of that, and memory stays small.
	if kb := rss(t, l.cmd.Process.Pid); kb > 20<<10 {
		t.Errorf("resident: %d KiB", kb)
	}
}

func rss(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// BenchmarkReady is what the logger adds to the start of a sandbox.
func BenchmarkReady(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		l, err := startLogger(b, "dir", dir)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		l.out.Close()
		l.err.Close()
		_ = l.cmd.Wait()
		b.StartTimer()
	}
}
