// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// upLimit bounds the time from starting qemu to the guest's first step; through
// virtiofs and emulated, systemd takes most of a minute.
const upLimit = 150 * time.Second

// host builds, boots and listens.
type host struct {
	repo      string
	dir       string // build/vm
	memoryMiB int
	accel     string // "kvm" or "tcg" after prepare
}

func (h *host) bin(name string) string { return filepath.Join(h.dir, "bin", name) }

// kernel is a file of the kernel of a version, as kernel.sh leaves it.
func (h *host) kernel(version, name string) string {
	return filepath.Join(h.dir, "kernel-"+version, name)
}

// lock waits for another run in the same checkout; the file's closing ends it.
func (h *host) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(h.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !said {
			fmt.Println("vm: waiting for another run to end")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// programs are what the guest's BULKHEAD_BIN holds, if it is built.
var programs = []string{
	"bulkhead", "bulkhead-agent", "bulkhead-gateway", "bulkhead-init", "bulkhead-log",
	"containerd", "containerd-shim-runc-v2", "ctr", "runc",
}

// copyPrograms gives the guest programs of its own: a build on the host while
// the guest runs would pull its files away.
func (h *host) copyPrograms() error {
	if err := os.MkdirAll(filepath.Join(h.dir, "programs"), 0o755); err != nil {
		return err
	}
	for _, name := range programs {
		body, err := os.ReadFile(filepath.Join(h.repo, "build", "bin", name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(h.dir, "programs", name), body, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// prepare builds the guest's side of this program and chooses the accelerator.
func (h *host) prepare(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: the guest sees this machine's root file system")
	}
	for _, version := range []string{kernel612, kernel61} {
		if _, err := os.Stat(h.kernel(version, "vmlinuz")); err != nil {
			return fmt.Errorf("guest kernel %s (make setup-vm fetches it): %w", version, err)
		}
	}
	if err := h.goTool(ctx, "build", "-o", h.bin("vm"), "./test/vm"); err != nil {
		return err
	}
	if err := h.copyPrograms(); err != nil {
		return err
	}
	if h.accel == "" {
		h.accel = h.chooseAccel(ctx)
	}
	return nil
}

// goTool runs go without cgo, so that a binary needs nothing of the host.
func (h *host) goTool(ctx context.Context, verb string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{verb, "-trimpath", "-buildvcs=false"}, args...)...)
	cmd.Dir = h.repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s %s: %w\n%s", verb, strings.Join(args, " "), err, out)
	}
	return nil
}

// build compiles the programs of a suite and answers what the guest runs.
func (h *host) build(ctx context.Context, s suite) (plan, error) {
	p := plan{Nonce: rand.Text(), Mode: s.mode, Kernel: s.version(), Repo: h.repo, Self: h.bin("vm"), Path: os.Getenv("PATH")}
	for _, st := range s.steps {
		name := strings.ReplaceAll(strings.TrimPrefix(st.pkg, "./"), "/", "-")
		ps := planStep{Name: st.pkg, Path: h.bin(name), Args: st.args, Dir: h.repo, Test: st.test, Limit: st.limit}
		args := []string{"-o", ps.Path, st.pkg}
		verb := "build"
		if st.test {
			// A test runs in the directory of its package, as under go test.
			ps.Path += ".test"
			ps.Dir = filepath.Join(h.repo, st.pkg)
			args[1] = ps.Path
			verb, args = "test", append([]string{"-c"}, args...)
		}
		if err := os.Remove(ps.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return p, err
		}
		if err := h.goTool(ctx, verb, args...); err != nil {
			return p, err
		}
		if _, err := os.Stat(ps.Path); err != nil {
			return p, fmt.Errorf("%s has no tests: %w", st.pkg, err)
		}
		p.Steps = append(p.Steps, ps)
	}
	return p, nil
}

// runSuite boots a guest, shows its console and answers nil if every step
// passed.
func (h *host) runSuite(ctx context.Context, s suite) error {
	start := time.Now()
	fmt.Printf("vm: suite %s: building\n", s.name)
	p, err := h.build(ctx, s)
	if err != nil {
		return err
	}
	initrd := filepath.Join(h.dir, s.name+".initrd")
	if err := h.writePlan(initrd, p); err != nil {
		return err
	}
	fmt.Printf("vm: suite %s: booting %s with %s, built in %.0fs\n", s.name, p.Kernel, h.accel, time.Since(start).Seconds())

	for attempt := 1; ; attempt++ {
		code, err := h.bootOnce(ctx, s, p, initrd)
		switch {
		case err == nil && code == 0:
			fmt.Printf("vm: suite %s: ok in %.0fs\n", s.name, time.Since(start).Seconds())
			return nil
		case errors.Is(err, errGuestDied) && h.accel == "tcg" && attempt < 4 && ctx.Err() == nil:
			// Emulated SMP guests die now and then while the kernel patches its
			// own text. What our code breaks, it breaks again.
			fmt.Printf("vm: suite %s: the emulated guest died; booting again\n", s.name)
		case err != nil:
			return fmt.Errorf("%w; the whole console is in %s", err, h.consoleLog(s))
		default:
			return fmt.Errorf("the guest's steps ended with %d; the whole console is in %s", code, h.consoleLog(s))
		}
	}
}

// errGuestDied says that the guest was gone before it had a result.
var errGuestDied = errors.New("the guest ended without a result")

func (h *host) consoleLog(s suite) string { return filepath.Join(h.dir, s.name+".log") }

// bootOnce boots a guest and answers the code of its steps.
func (h *host) bootOnce(ctx context.Context, s suite, p plan, initrd string) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.limit, fmt.Errorf("not done within %v", s.limit))
	defer cancel()
	memoryMiB := h.memoryMiB
	if s.memoryMiB != 0 {
		memoryMiB = s.memoryMiB
	}
	start := time.Now()
	g, err := h.boot(ctx, h.accel, p.Kernel, memoryMiB, initrd, true)
	if err != nil {
		return 1, err
	}
	defer g.kill()
	log, err := os.Create(h.consoleLog(s))
	if err != nil {
		return 1, err
	}
	code, err := listen(ctx, g.console, log, p.Nonce, start)
	return code, errors.Join(err, log.Close())
}

func (h *host) writePlan(initrd string, p plan) error {
	body, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return writeInitrd(initrd, h.bin("vm"), h.kernel(p.Kernel, "early"), body)
}

// listen copies the console to log, shows it from the guest's first line on,
// and answers the code of the result line. A guest that dies first is shown
// from its beginning.
func listen(ctx context.Context, console io.Reader, log io.Writer, nonce string, start time.Time) (int, error) {
	lines := make(chan string, 64) // closed at the end of the console
	go func() {
		defer close(lines)
		for r := bufio.NewReader(console); ; {
			line, err := r.ReadString('\n')
			if line != "" {
				select {
				case lines <- strings.TrimRight(line, "\r\n"):
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	var early []string // what came before upLine
	up := false
	tooLate := time.NewTimer(upLimit)
	defer tooLate.Stop()
	fail := func(err error) (int, error) {
		if !up {
			for _, line := range early[max(0, len(early)-60):] {
				fmt.Println("    " + line)
			}
		}
		return 1, err
	}
	for {
		select {
		case line, open := <-lines:
			if !open {
				return fail(errGuestDied)
			}
			fmt.Fprintf(log, "%7.1f %s\n", time.Since(start).Seconds(), line)
			if code, ok := parseResult(line, nonce); ok {
				return code, nil
			}
			switch {
			case up:
				fmt.Println("    " + line)
			case strings.Contains(line, upLine):
				up = true
				tooLate.Stop()
				fmt.Printf("vm: guest up after %.1fs\n", time.Since(start).Seconds())
			default:
				early = append(early, line)
			}
		case <-tooLate.C:
			return fail(fmt.Errorf("the guest ran no step within %v", upLimit))
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
}

// guest is a running qemu with its file server.
type guest struct {
	console   io.Reader
	processes []*exec.Cmd
	dir       string // of the socket
}

// kill ends the processes that this guest is, and waits for them.
func (g *guest) kill() {
	for i := len(g.processes) - 1; i >= 0; i-- {
		p := g.processes[i]
		_ = p.Process.Kill() // it may have ended by itself
		_ = p.Wait()         // the console said all there is to know
	}
	_ = os.RemoveAll(g.dir) // only a dead socket is in it
}

// start runs a process that dies with this one.
func (g *guest) start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	g.processes = append(g.processes, cmd)
	return nil
}
