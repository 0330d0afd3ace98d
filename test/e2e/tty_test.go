// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a command line on a terminal of its own.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	cancel context.CancelFunc
	master *os.File
	read   sync.WaitGroup

	mu  sync.Mutex
	out []byte
}

// terminal starts the command line on a terminal of a size.
func (n *node) terminal(rows, cols uint16, args ...string) *terminal {
	n.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		n.t.Fatalf("unlock terminal: %v", err)
	}
	num, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		n.t.Fatalf("number of terminal: %v", err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(num), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer slave.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	tty := &terminal{t: n.t, cmd: n.Command(ctx, args...), cancel: cancel, master: master}
	tty.resize(rows, cols)
	tty.cmd.Stdin, tty.cmd.Stdout, tty.cmd.Stderr = slave, slave, slave
	tty.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := tty.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	tty.read.Go(func() {
		buf := make([]byte, 4096)
		for {
			k, err := master.Read(buf)
			tty.mu.Lock()
			tty.out = append(tty.out, buf[:k]...)
			tty.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	n.t.Cleanup(func() { cancel(); master.Close() })
	return tty
}

func (tty *terminal) resize(rows, cols uint16) {
	tty.t.Helper()
	if err := unix.IoctlSetWinsize(int(tty.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		tty.t.Fatalf("resize terminal: %v", err)
	}
	if tty.cmd.Process != nil {
		_ = tty.cmd.Process.Signal(syscall.SIGWINCH)
	}
}

func (tty *terminal) write(s string) {
	tty.t.Helper()
	if _, err := tty.master.WriteString(s); err != nil {
		tty.t.Fatalf("write %q: %v", s, err)
	}
}

func (tty *terminal) text() string {
	tty.mu.Lock()
	defer tty.mu.Unlock()
	return string(tty.out)
}

func (tty *terminal) await(text string) {
	tty.t.Helper()
	for range 300 {
		if strings.Contains(tty.text(), text) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	tty.t.Errorf("the terminal never shows %q but %q", text, tty.text())
}

// end waits until the command line has ended and answers all it wrote.
func (tty *terminal) end() (out string, code int) {
	tty.t.Helper()
	_ = tty.cmd.Wait()
	tty.read.Wait() // the last slave is closed
	tty.cancel()
	return tty.text(), tty.cmd.ProcessState.ExitCode()
}

func md5sum(s string) string {
	sum := md5.Sum([]byte(s))
	return hex.EncodeToString(sum[:])
}

// kill sends KILL to a process.
func kill(pid string) error {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return err
	}
	return syscall.Kill(n, syscall.SIGKILL)
}
