// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hooking puts programs on links and keeps them there. id is that of a sandbox.
type hooking interface {
	name() string
	// attach makes sure that the hook's program runs first on the link and is
	// pinned. It puts right what differs.
	attach(id string, ifindex int, h hook) error
	// verify is ErrNotEnforced if attach would have something to do.
	verify(id string, ifindex int, h hook) error
	// detach removes programs and pins of the sandbox, those of links that are
	// gone too.
	detach(id string) error
	// upgrade puts the hook's program in the place of an older version, without a
	// gap. What is not attached stays so.
	upgrade(id string, h hook) error
}

// newHooking chooses what the kernel has: TCX, which 6.6 brought, or clsact. It
// says in one line what the kernel or this process lacks.
func (e *Enforcer) newHooking() (hooking, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	err := features.HaveProgramHelper(ebpf.SchedCLS, asm.FnKtimeGetCoarseNs)
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: this process may not use BPF: run it as root or with CAP_BPF and CAP_NET_ADMIN", ErrUnsupported)
	case errors.Is(err, unix.ENOSYS):
		return nil, fmt.Errorf("%w: %s was built without BPF: boot one with CONFIG_BPF_SYSCALL=y", ErrUnsupported, release)
	case errors.Is(err, ebpf.ErrNotSupported):
		return nil, fmt.Errorf("%w: %s is too old: boot kernel 5.15 or later", ErrUnsupported, release)
	default:
		return nil, fmt.Errorf("%w: probe BPF on %s: %w", ErrUnsupported, release, err)
	}
	// Asking a device for its TCX programs needs TCX and changes nothing.
	_, err = link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil && !e.cfg.forceClsact:
		return tcx{e}, nil
	case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, ebpf.ErrNotSupported):
		for _, p := range e.spec.Programs {
			p.AttachType = ebpf.AttachNone // the kernel may not know the other ones
		}
		return clsact{e}, nil
	}
	return nil, fmt.Errorf("%w: query TCX on %s: %w", ErrUnsupported, release, err)
}

// tcx puts programs on links on kernel 6.6 and later. A pinned bpf_link holds
// each program there, under links/<id>/HOOK.
type tcx struct{ e *Enforcer }

func (tcx) name() string { return "tcx" }

// Hook names where programs are attached: tcx or clsact.
func (e *Enforcer) Hook() string { return e.hooking.name() }

func (x tcx) pin(id string, h hook) string { return filepath.Join(x.e.linkDir(id), h.pin) }

func (x tcx) attach(id string, ifindex int, h hook) error {
	pin := x.pin(id, h)
	l, err := link.LoadPinnedLink(pin, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("open %s: %w", pin, err)
	default:
		if err := checkLink(l, h, ifindex); err == nil {
			return l.Close()
		}
		// Left from a link that is gone, or detached by hand.
		if err := dropLink(l); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(x.e.linkDir(id), 0o700); err != nil {
		return err
	}
	l, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: h.prog, Attach: h.attach, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("link %d: %w", ifindex, err)
	}
	if err := l.Pin(pin); err != nil {
		l.Close()
		return fmt.Errorf("pin: %w", err)
	}
	return l.Close()
}

func (x tcx) verify(id string, ifindex int, h hook) error {
	l, err := link.LoadPinnedLink(x.pin(id, h), nil)
	if err != nil {
		return fmt.Errorf("%w: open pin %s: %w", ErrNotEnforced, h.pin, err)
	}
	defer l.Close()
	return checkLink(l, h, ifindex)
}

// dropLink unpins and closes a link. That detaches it.
func dropLink(l link.Link) error {
	return errors.Join(l.Unpin(), l.Close())
}

// checkLink compares a link with what the hook should be.
func checkLink(l link.Link, h hook, ifindex int) error {
	info, err := l.Info()
	if err != nil {
		return err
	}
	tcx := info.TCX()
	if tcx == nil || tcx.Ifindex != uint32(ifindex) || ebpf.AttachType(tcx.AttachType) != h.attach {
		return fmt.Errorf("%w: %s is not attached to link %d", ErrNotEnforced, h.pin, ifindex)
	}
	want, err := programID(h.prog)
	if err != nil {
		return err
	}
	if info.Program != want {
		return fmt.Errorf("%w: %s runs program %d, not %d", ErrNotEnforced, h.pin, info.Program, want)
	}
	first, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: h.attach})
	if err != nil {
		return fmt.Errorf("%w: query %s of link %d: %w", ErrNotEnforced, h.pin, ifindex, err)
	}
	if len(first.Programs) == 0 || first.Programs[0].ID != want {
		return fmt.Errorf("%w: another program runs before ours at %s of link %d", ErrNotEnforced, h.pin, ifindex)
	}
	if id, ok := first.Programs[0].LinkID(); !ok || id != info.ID {
		return fmt.Errorf("%w: %s of link %d is not held by our pin", ErrNotEnforced, h.pin, ifindex)
	}
	return nil
}

func (x tcx) detach(id string) error {
	for _, h := range x.e.hooks() {
		l, err := link.LoadPinnedLink(x.pin(id, h), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open pin %s: %w", h.pin, err)
		}
		if err := dropLink(l); err != nil {
			return fmt.Errorf("detach %s: %w", h.pin, err)
		}
	}
	if err := os.Remove(x.e.linkDir(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// A pin that is not there or whose device is gone has nothing to upgrade.
func (x tcx) upgrade(id string, h hook) error {
	l, err := link.LoadPinnedLink(x.pin(id, h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Update(h.prog); err != nil && !errors.Is(err, unix.ENOLINK) {
		return err
	}
	return nil
}
