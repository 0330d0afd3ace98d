// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runGuest runs the plan's steps on the console and ends the guest.
func runGuest(file string) int {
	console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bulkhead-vm:", err)
		return 1
	}
	body, err := os.ReadFile(file)
	var p plan
	if err == nil {
		err = json.Unmarshal(body, &p)
	}
	if err == nil {
		err = loopbackUp()
	}
	fmt.Fprintln(console, "\n"+upLine)
	code := 0
	if err != nil {
		fmt.Fprintln(console, "bulkhead-vm:", err)
		code = 1
	}
	for _, s := range p.Steps {
		start := time.Now()
		verdict := "ok"
		note, err := runStep(console, s, guestEnv(p))
		if err != nil {
			verdict, code = "FAIL", 1
			note += ": " + err.Error()
		}
		fmt.Fprintf(console, "vm: %-4s %s %.1fs %s\n", verdict, s.Name, time.Since(start).Seconds(), note)
	}
	fmt.Fprintln(console, "\n"+resultLine(p.Nonce, code))
	_ = unix.IoctlSetInt(int(console.Fd()), unix.TCSBRK, 1) // drain; a lost result is seen by the host
	powerOff()
	return code
}

// runStep runs one program with its limit. All that it left running is not
// awaited: the guest ends anyway.
func runStep(console io.Writer, s planStep, env []string) (note string, err error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), s.Limit, fmt.Errorf("not done within %v", s.Limit))
	defer cancel()
	args := s.Args
	if s.Test {
		// The test's own limit comes first: it prints what every goroutine does.
		args = append([]string{"-test.v", "-test.timeout=" + (s.Limit * 9 / 10).String()}, args...)
	}
	cmd := exec.CommandContext(ctx, s.Path, args...)
	cmd.Dir, cmd.Env = s.Dir, env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return "", err
	}
	if s.Test {
		var sum testSummary
		sum.read(out, console)
		err = cmd.Wait()
		if err != nil {
			sum.dump(console)
		} else if sum.passed == 0 {
			err = errors.New("no test passed")
		}
		note = sum.String()
	} else {
		_, _ = io.Copy(console, out) // Wait says how it ended
		err = cmd.Wait()
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return note, err
}

// testSummary reads the verbose output of a test binary: it shows only verdicts
// of whole tests, and keeps the rest for when something fails.
type testSummary struct {
	passed, failed, skipped int
	kept                    []string
	dropped                 int
}

// keepLines bounds what a failed step prints: the console is slow.
const keepLines = 2000

func (t *testSummary) read(r io.Reader, console io.Writer) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if line = strings.TrimRight(line, "\n"); line != "" {
			t.line(line, console)
		}
		if err != nil {
			return // Wait says why
		}
	}
}

func (t *testSummary) line(line string, console io.Writer) {
	verdict, isVerdict := strings.CutPrefix(line, "--- ")
	kind, _, _ := strings.Cut(verdict, ":")
	switch {
	case !isVerdict:
	case kind == "PASS":
		t.passed++
	case kind == "SKIP":
		t.skipped++
	case kind == "FAIL":
		t.failed++
	}
	if isVerdict {
		fmt.Fprintln(console, line)
	}
	if len(t.kept) == keepLines {
		t.kept = t.kept[1:]
		t.dropped++
	}
	t.kept = append(t.kept, line)
}

func (t *testSummary) dump(console io.Writer) {
	fmt.Fprintf(console, "output of the failed test binary, %d earlier lines left out:\n", t.dropped)
	for _, line := range t.kept {
		if !strings.HasPrefix(line, "=== ") {
			fmt.Fprintln(console, "  "+line)
		}
	}
}

func (t *testSummary) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.skipped)
}

// loopbackUp does what every system does before its first service.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}
