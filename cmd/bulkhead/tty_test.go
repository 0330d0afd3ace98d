// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// screen is a terminal: what a program writes to it, and keys.
type screen struct {
	t      *testing.T
	master *os.File
	slave  *os.File
	seen   buffer
	before *unix.Termios
}

func newScreen(t *testing.T) *screen {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	s := &screen{t: t, master: master, slave: slave}
	s.resize(24, 80)
	s.before = s.mode()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			s.seen.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *screen) resize(rows, cols uint16) {
	s.t.Helper()
	if err := unix.IoctlSetWinsize(int(s.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *screen) mode() *unix.Termios {
	s.t.Helper()
	m, err := unix.IoctlGetTermios(int(s.slave.Fd()), unix.TCGETS)
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// run starts cmd with the screen as its controlling terminal.
func (s *screen) run(cmd *exec.Cmd) {
	s.t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.slave, s.slave, s.slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *screen) expect(text string) {
	s.t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(s.seen.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("screen never showed %q: %q", text, s.seen.String())
		}
	}
}

// asBefore checks that whoever used the terminal put it back.
func (s *screen) asBefore() {
	s.t.Helper()
	if diff := cmp.Diff(s.before, s.mode()); diff != "" {
		s.t.Errorf("terminal was not restored:\n%s", diff)
	}
}

func TestTerminal(t *testing.T) {
	for _, first := range []string{"run", "exec"} {
		t.Run(first, func(t *testing.T) {
			f, s := newFakeNode(t), newScreen(t)
			script := "size; size; read; exit 5"
			args := []string{"run", "-it", "--rm", "alpine", "sh", "-c", script}
			if first == "exec" {
				runHere(t, f, 0, "run", "-d", "--name", "a", "alpine", "sleep")
				args = []string{"exec", "-it", "a", "sh", "-c", script}
			}
			cmd := f.program(args...)
			s.run(cmd)
			s.expect("24 x 80")
			if s.mode().Lflag&unix.ICANON != 0 {
				t.Error("the terminal is not raw")
			}
			s.resize(50, 132)
			s.expect("50 x 132")
			s.master.WriteString("\x03") // a key like any other, not an interrupt
			s.expect(`got "\x03"`)
			if got := exitCode(t, cmd.Wait()); got != 5 {
				t.Errorf("exit code: got %d, want 5", got)
			}
			s.asBefore()
		})
	}
}

func TestTerminalIsRestoredAfterSignal(t *testing.T) {
	t.Run("run", func(t *testing.T) {
		f, s := newFakeNode(t), newScreen(t)
		cmd := f.program("run", "-it", "alpine", "sh", "-c", "attached; echo ready; sleep")
		s.run(cmd)
		s.expect("ready")
		cmd.Process.Signal(syscall.SIGTERM)
		if got := exitCode(t, cmd.Wait()); got != 143 {
			t.Errorf("exit code: got %d, want 143", got)
		}
		if got := f.graces(); !slices.Equal(got, []int64{0}) {
			t.Errorf("graces: got %v, want [0]", got)
		}
		s.asBefore()
	})
	t.Run("attach", func(t *testing.T) {
		f, s := newFakeNode(t), newScreen(t)
		runHere(t, f, 0, "run", "-dit", "--name", "a", "alpine", "sh", "-c", "attached; echo ready; sleep")
		cmd := f.program("attach", "a")
		s.run(cmd)
		s.expect("ready")
		cmd.Process.Signal(syscall.SIGHUP)
		if got := exitCode(t, cmd.Wait()); got != 128+int(syscall.SIGHUP) {
			t.Errorf("exit code: got %d, want %d", got, 128+int(syscall.SIGHUP))
		}
		s.expect("left; sandbox " + f.id(0) + " runs on")
		if got := f.graces(); len(got) != 0 {
			t.Errorf("attach stopped the sandbox: %v", got)
		}
		s.asBefore()
	})
	t.Run("agent", func(t *testing.T) {
		f, s := newFakeNode(t), newScreen(t)
		cmd := f.program("run", "-it", "alpine", "sh", "-c", "attached; echo ready; sleep")
		s.run(cmd)
		s.expect("ready")
		f.halt()
		if got := exitCode(t, cmd.Wait()); got != exitFailure {
			t.Errorf("exit code: got %d, want %d", got, exitFailure)
		}
		s.expect("bulkhead attach " + f.id(0))
		s.asBefore()
		f.start()
	})
}

// A command that was over before the terminal was attached has still written.
func TestTerminalTooLate(t *testing.T) {
	for _, late := range []bool{false, true} {
		f, s := newFakeNode(t), newScreen(t)
		f.set(func() { f.late = late })
		cmd := f.program("run", "-it", "alpine", "echo", "quick")
		s.run(cmd)
		if got := exitCode(t, cmd.Wait()); got != 0 {
			t.Errorf("exit code: got %d, want 0", got)
		}
		s.expect("quick")
		s.asBefore()
	}
}

// Progress is for slow work on a terminal and leaves nothing behind.
func TestProgress(t *testing.T) {
	f, s := newFakeNode(t), newScreen(t)
	gate := make(chan struct{})
	f.set(func() { f.gate = gate })
	cmd := f.program("run", "-d", "alpine", "sleep")
	s.run(cmd)
	s.expect("starting alpine ...")
	close(gate)
	if got := exitCode(t, cmd.Wait()); got != 0 {
		t.Errorf("exit code: got %d, want 0", got)
	}
	s.expect("\r\x1b[K" + f.id(0) + "\r\n")
}
