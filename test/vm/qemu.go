// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// fileServer of Debian 12's qemu. It leaves its own limit on open files alone:
// raising it needs a privilege that a container's root has not.
const fileServer = "/usr/lib/qemu/virtiofsd"

// probeLimit is ten times what a guest takes to its first line under KVM.
const probeLimit = 8 * time.Second

// boot starts a guest; share gives it this machine's root file system.
func (h *host) boot(ctx context.Context, accel, kernel string, memoryMiB int, initrd string, share bool) (*guest, error) {
	dir, err := os.MkdirTemp("", "bulkhead-vm")
	if err != nil {
		return nil, err
	}
	g := &guest{dir: dir}
	args := []string{
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-m", strconv.Itoa(memoryMiB) + "M", "-smp", "2",
		"-kernel", h.kernel(kernel, "vmlinuz"), "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off systemd.unit=" + targetUnit +
			" systemd.show_status=false systemd.log_target=kmsg systemd.log_level=warning",
	}
	if accel == "kvm" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		// An old CPU model is twice as fast to emulate: no AVX.
		args = append(args, "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "Nehalem")
	}
	if share {
		socket := filepath.Join(dir, "fs")
		if err := g.serveRoot(ctx, socket); err != nil {
			g.kill()
			return nil, err
		}
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", memoryMiB),
			"-numa", "node,memdev=mem", "-chardev", "socket,id=fs,path="+socket,
			"-device", "vhost-user-fs-pci,chardev=fs,tag="+rootTag)
	}
	qemu := exec.Command("qemu-system-x86_64", args...)
	if share { // a probe's complaints are its answer
		qemu.Stderr = os.Stderr
	}
	console, err := qemu.StdoutPipe()
	if err == nil {
		err = g.start(qemu)
	}
	if err != nil {
		g.kill()
		return nil, fmt.Errorf("start qemu: %w", err)
	}
	g.console = console
	return g, nil
}

// serveRoot starts the file server and waits for its socket.
func (g *guest) serveRoot(ctx context.Context, socket string) error {
	var said bytes.Buffer
	server := exec.Command(fileServer, "--socket-path="+socket, "--rlimit-nofile=0",
		"-o", "source=/", "-o", "cache=auto", "-o", "sandbox=chroot", "-o", "log_level=err")
	server.Stdout, server.Stderr = &said, &said
	if err := g.start(server); err != nil {
		return fmt.Errorf("start virtiofsd: %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; {
		if _, err := os.Stat(socket); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	g.kill() // before its output is read
	g.processes = nil
	return fmt.Errorf("virtiofsd made no socket: %s", strings.TrimSpace(said.String()))
}

// chooseAccel tries KVM with a guest that only says that it is up: the device
// may exist, open and still not run a kernel. What was found holds until the
// next boot of this machine.
func (h *host) chooseAccel(ctx context.Context) string {
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "tcg"
	}
	cache := filepath.Join(h.dir, "accel")
	if known, err := os.ReadFile(cache); err == nil {
		if accel, ok := bytes.CutPrefix(known, bootID); ok {
			return string(accel)
		}
	}
	accel := "tcg"
	if err := h.probeKVM(ctx); err == nil {
		accel = "kvm"
	} else {
		fmt.Printf("vm: no KVM, emulating: %v\n", err)
	}
	if ctx.Err() == nil {
		_ = os.WriteFile(cache, append(bootID, accel...), 0o644) // the next run asks again
	}
	return accel
}

func (h *host) probeKVM(ctx context.Context) error {
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	dev.Close()
	p := plan{Nonce: "probe", Mode: probe, Kernel: kernel612}
	initrd := filepath.Join(h.dir, "probe.initrd")
	if err := h.writePlan(initrd, p); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, probeLimit, errors.New("/dev/kvm is there and runs nothing"))
	defer cancel()
	g, err := h.boot(ctx, "kvm", p.Kernel, 512, initrd, false)
	if err != nil {
		return err
	}
	defer g.kill()
	_, err = listen(ctx, g.console, new(bytes.Buffer), p.Nonce, time.Now())
	return err
}
