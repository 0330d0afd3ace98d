// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	guestVerb  = "guest-steps" // argument that makes this program run a plan
	rootTag    = "hostroot"
	newRoot    = "/root.new"
	planFile   = "/bulkhead-vm.json" // in the guest's overlay
	targetUnit = "bulkhead-vm.target"

	probe mode = "probe" // say up and go
)

// boot is /init of the guest: PID 1 in the initial RAM disk. It never returns;
// if it cannot go on it says why and restarts, which ends qemu.
func boot() {
	err := bootSteps()
	fmt.Println("bulkhead-vm: boot:", err)
	powerOff()
}

func bootSteps() error {
	body, err := os.ReadFile("/plan.json")
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(body, &p); err != nil {
		return fmt.Errorf("plan: %w", err)
	}
	if p.Mode == probe {
		fmt.Println(upLine)
		fmt.Println(resultLine(p.Nonce, 0))
		powerOff()
	}
	if err := loadEarly("/early"); err != nil {
		return err
	}
	if err := mountRoot(p.Repo); err != nil {
		return err
	}
	if err := dress(p, body); err != nil {
		return err
	}
	if err := enterRoot(); err != nil {
		return err
	}
	if p.Mode == systemd {
		return fmt.Errorf("exec systemd: %w", syscall.Exec("/lib/systemd/systemd", []string{"/lib/systemd/systemd"}, guestEnv(p)))
	}
	if err := mountPlain(); err != nil {
		return err
	}
	return reap(p)
}

// loadEarly loads all modules of a directory in the order of their names.
func loadEarly(dir string) error {
	modules, err := os.ReadDir(dir) // sorted
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := loadModule(filepath.Join(dir, m.Name())); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", file, err)
	}
	return nil
}

// mountRoot puts the host's root below an overlay in memory. The repository is
// seen even if it lies where the guest has a directory of its own.
func mountRoot(repo string) error {
	err := mountAll([]mountPoint{
		{"tmpfs", "/layers", "tmpfs", 0, "mode=755"},
		{rootTag, "/layers/host", "virtiofs", unix.MS_RDONLY, ""},
	})
	if err != nil {
		return err
	}
	for _, dir := range []string{"/layers/upper", "/layers/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return mountAll([]mountPoint{
		{"overlay", newRoot, "overlay", 0, "lowerdir=/layers/host,upperdir=/layers/upper,workdir=/layers/work"},
		{newRoot + repo, "/layers/repo", "", unix.MS_BIND, ""},
		{"proc", newRoot + "/proc", "proc", 0, ""},
		{"sysfs", newRoot + "/sys", "sysfs", 0, ""},
		{"devtmpfs", newRoot + "/dev", "devtmpfs", 0, "mode=755"},
		{"tmpfs", newRoot + "/run", "tmpfs", 0, "mode=755"},
		// Not in the overlay: containerd's own overlays cannot have one below.
		{"tmpfs", newRoot + "/tmp", "tmpfs", 0, "mode=1777"},
		{"tmpfs", newRoot + "/var/lib", "tmpfs", 0, "mode=755"},
		{"/layers/repo", newRoot + repo, "", unix.MS_BIND, ""},
	})
}

// dress writes what makes the host's root a guest's root.
func dress(p plan, planBody []byte) error {
	// The guest's modules where its kernel looks for them.
	modules := newRoot + "/lib/modules"
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(newRoot+filepath.Join(p.Repo, "build/vm/kernel-"+p.Kernel, "lib/modules"), modules, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind modules: %w", err)
	}
	// A host that is a container says so here, and systemd would believe it.
	if err := os.Remove(newRoot + "/.dockerenv"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	files := map[string]string{
		planFile:          string(planBody),
		"/etc/fstab":      "",
		"/etc/hostname":   "guest\n",
		"/etc/machine-id": "62756c6b68656164766d677565737400\n",
	}
	if p.Mode == systemd {
		units, err := systemdFiles(p)
		if err != nil {
			return err
		}
		maps.Copy(files, units)
	}
	for name, text := range files {
		// Removed first: the host's may be a link.
		if err := os.Remove(newRoot + name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(newRoot+name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(newRoot+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// systemdFiles are units: one target that pulls in a normal system's basic
// parts and the steps. What belongs to a machine with disks, terminals, timers
// and users is masked by an empty file, and so are generators: under emulation
// each costs seconds.
func systemdFiles(p plan) (map[string]string, error) {
	const units = "/etc/systemd/system/"
	files := map[string]string{
		units + targetUnit: "[Unit]\nRequires=basic.target\nWants=bulkhead-vm.service\nAfter=basic.target\nAllowIsolate=yes\n",
		units + "bulkhead-vm.service": "[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nTimeoutStartSec=infinity\nDelegate=yes\n" +
			"ExecStart=" + p.Self + " " + guestVerb + " " + planFile + "\n",
	}
	for _, masked := range []string{
		"cryptsetup.target", "getty.target", "integritysetup.target", "paths.target", "swap.target", "timers.target", "veritysetup.target",
		"dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount", "sys-fs-fuse-connections.mount",
		"sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
		"kmod-static-nodes.service", "ldconfig.service", "modprobe@.service", "systemd-binfmt.service", "systemd-firstboot.service",
		"systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-journal-flush.service",
		"systemd-machine-id-commit.service", "systemd-modules-load.service", "systemd-pcrphase-sysinit.service",
		"systemd-pcrphase.service", "systemd-random-seed.service", "systemd-remount-fs.service", "systemd-sysusers.service",
		"systemd-timesyncd.service", "systemd-udev-settle.service", "systemd-udev-trigger.service",
		"systemd-update-done.service", "systemd-update-utmp.service",
	} {
		files[units+masked] = ""
	}
	generators, err := os.ReadDir(newRoot + "/lib/systemd/system-generators")
	for _, g := range generators {
		files["/etc/systemd/system-generators/"+g.Name()] = ""
	}
	return files, err
}

// enterRoot makes the overlay the root, as switch_root does.
func enterRoot() error {
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

// mountPlain adds what systemd would have mounted.
func mountPlain() error {
	if err := mountAll([]mountPoint{
		{"devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "nsdelegate,memory_recursiveprot"},
		{"bpf", "/sys/fs/bpf", "bpf", 0, "mode=700"},
	}); err != nil {
		return err
	}
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+target, "/dev/"+name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, "") // as under systemd
}

type mountPoint struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func mountAll(points []mountPoint) error {
	for _, m := range points {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	return nil
}

// reap starts the steps as a child and waits for every process that has lost
// its parent, as an init does: a shim's dead are not left in its cgroup.
func reap(p plan) error {
	child, err := os.StartProcess(p.Self, []string{p.Self, guestVerb, planFile}, &os.ProcAttr{
		Env: guestEnv(p), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait: %w", err)
		}
		if pid == child.Pid {
			return fmt.Errorf("the steps ended without a result: %v", status)
		}
	}
}

func guestEnv(p plan) []string {
	programs := filepath.Join(p.Repo, "build/vm/programs")
	return []string{
		"PATH=" + programs + ":" + p.Path + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "TMPDIR=/tmp", "LANG=C.UTF-8", "CI=true", "BULKHEAD_BIN=" + programs,
	}
}

// powerOff ends qemu, which was told not to restart.
func powerOff() {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	fmt.Println("bulkhead-vm: restart:", err)
	select {} // the host's limit ends it
}
