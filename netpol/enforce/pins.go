// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// layoutDir and layoutVersion are those of bpf/include/abi.h.
const (
	layoutVersion = 2
	layoutDir     = "v2"
)

const (
	progFrom    = "from_sandbox"
	progTo      = "to_sandbox"
	progExplain = "explain"
)

// bpffsRoot is where hosts mount the bpffs, a directory that sysfs provides.
const bpffsRoot = "/sys/fs/bpf"

// mountBPF makes dir, and mounts a bpffs if it would not be on one: on
// bpffsRoot if dir is below it, otherwise on dir.
func mountBPF(dir string) error {
	at := dir
	if strings.HasPrefix(dir, bpffsRoot+"/") {
		at = bpffsRoot
	}
	if err := os.MkdirAll(at, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", at, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		if privateMounts() {
			return fmt.Errorf("mount bpffs on %s: this process has a mount namespace of its own, the pins would die with it: mount it on the host, as systemd does on %s", at, bpffsRoot)
		}
		if err := unix.Mount("bpf", at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs on %s: %w", at, err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	return nil
}

// privateMounts tells whether what this process mounts is seen by itself
// alone. It is false if that cannot be known.
func privateMounts() bool {
	own, err := os.Readlink("/proc/self/ns/mnt")
	host, hostErr := os.Readlink("/proc/1/ns/mnt")
	return err == nil && hostErr == nil && own != host
}

// lockDir keeps other processes off the pins until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pin directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", dir, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

func (e *Enforcer) mapPin(name string) string  { return filepath.Join(e.dir, "maps", name) }
func (e *Enforcer) progPin(name string) string { return filepath.Join(e.dir, "progs", name) }
func (e *Enforcer) metaPin() string            { return filepath.Join(e.dir, "meta") }
func (e *Enforcer) linkDir(id string) string   { return filepath.Join(e.dir, "links", id) }

// openPins opens what is pinned, or makes and pins everything.
func (e *Enforcer) openPins() error {
	if err := e.checkLayouts(); err != nil {
		return err
	}
	meta, err := ebpf.LoadPinnedMap(e.metaPin(), nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return e.create()
	case err != nil:
		return fmt.Errorf("open %s: %w", e.metaPin(), err)
	}
	e.maps["meta"] = meta
	return e.reopen()
}

// checkLayouts refuses pins of other layouts: they belong to sandboxes that
// this version cannot see.
func (e *Enforcer) checkLayouts() error {
	entries, err := os.ReadDir(e.cfg.PinDir)
	if err != nil {
		return fmt.Errorf("read pin directory: %w", err)
	}
	for _, d := range entries {
		if d.IsDir() && d.Name() != layoutDir && strings.HasPrefix(d.Name(), "v") {
			return fmt.Errorf("%w: %s holds layout %s, this version needs %s: drain the node with the version that made it, then purge",
				ErrLayout, e.cfg.PinDir, d.Name(), layoutDir)
		}
	}
	return nil
}

// create makes everything anew. What is there without a meta is the remainder
// of a create that did not finish; no sandbox can have been attached.
func (e *Enforcer) create() error {
	if err := os.RemoveAll(e.dir); err != nil {
		return fmt.Errorf("remove unfinished pins: %w", err)
	}
	for _, d := range []string{"maps", "progs", "links"} {
		if err := os.MkdirAll(filepath.Join(e.dir, d), 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	for name, spec := range e.spec.Maps {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return fmt.Errorf("create map %s: %w", name, err)
		}
		e.maps[name] = m
		if name == "meta" {
			continue
		}
		if err := m.Pin(e.mapPin(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	e.generations.meta = e.maps["meta"]
	e.generations.resume(1)
	if err := e.loadPrograms(); err != nil {
		return err
	}
	for name, p := range e.programs() {
		if err := p.Pin(e.progPin(name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	if err := e.writeMeta(bpf.Digest()); err != nil {
		return err
	}
	if err := e.maps["meta"].Pin(e.metaPin()); err != nil {
		return fmt.Errorf("pin meta: %w", err)
	}
	return nil
}

// reopen takes up the pins that belong to the meta already open.
func (e *Enforcer) reopen() error {
	var meta bpf.DatapathBhMeta
	if err := e.spec.Maps["meta"].Compatible(e.maps["meta"]); err != nil {
		return fmt.Errorf("%w: meta: %w", ErrLayout, err)
	}
	if err := e.maps["meta"].Lookup(uint32(0), &meta); err != nil {
		return fmt.Errorf("read meta: %w", err)
	}
	if meta.Layout != layoutVersion {
		return fmt.Errorf("%w: %s holds layout %d, this version needs %d: drain the node with the version that made it, then purge",
			ErrLayout, e.dir, meta.Layout, layoutVersion)
	}
	if meta.MaxSandboxes != e.cfg.MaxSandboxes {
		return fmt.Errorf("%w: %s was made for %d sandboxes, not %d: go on with %[3]d, or drain the node and purge",
			ErrLayout, e.dir, meta.MaxSandboxes, e.cfg.MaxSandboxes)
	}
	for name, spec := range e.spec.Maps {
		if name == "meta" {
			continue
		}
		m, err := ebpf.LoadPinnedMap(e.mapPin(name), nil)
		if err != nil {
			return fmt.Errorf("open map %s: %w", name, err)
		}
		e.maps[name] = m
		if err := spec.Compatible(m); err != nil {
			return fmt.Errorf("%w: map %s: %w", ErrLayout, name, err)
		}
	}
	e.generations.meta = e.maps["meta"]
	e.generations.resume(meta.NextGen)
	if meta.Program == bpf.Digest() {
		return e.openPrograms()
	}
	return e.upgrade()
}

// openPrograms opens the pinned programs, which are those of this version.
func (e *Enforcer) openPrograms() error {
	for name, p := range map[string]**ebpf.Program{progFrom: &e.fromSandbox, progTo: &e.toSandbox, progExplain: &e.explain} {
		var err error
		if *p, err = ebpf.LoadPinnedProgram(e.progPin(name), nil); err != nil {
			return fmt.Errorf("open program %s: %w", name, err)
		}
	}
	return nil
}

// upgrade puts the programs of this version into every link. Each link runs
// the old program or the new one at any moment. The digest is written last: a
// crash before makes the next Open do it again.
func (e *Enforcer) upgrade() error {
	if err := e.writeMeta([sha256.Size]byte{}); err != nil {
		return err
	}
	if err := e.loadPrograms(); err != nil {
		return err
	}
	ids, err := e.pinned()
	if err != nil {
		return err
	}
	for _, id := range ids {
		for _, h := range e.hooks() {
			if err := e.hooking.upgrade(id, h); err != nil {
				return fmt.Errorf("upgrade %s of %s: %w", h.pin, id, err)
			}
		}
	}
	for name, p := range e.programs() {
		if err := os.Remove(e.progPin(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("unpin old program: %w", err)
		}
		if err := p.Pin(e.progPin(name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return e.writeMeta(bpf.Digest())
}

// loadPrograms loads the programs of this version onto the open maps.
func (e *Enforcer) loadPrograms() error {
	c, err := ebpf.NewCollectionWithOptions(e.spec, ebpf.CollectionOptions{MapReplacements: e.maps})
	if err != nil {
		return fmt.Errorf("load datapath: %w", err)
	}
	defer c.Close()
	e.fromSandbox = c.DetachProgram(progFrom)
	e.toSandbox = c.DetachProgram(progTo)
	e.explain = c.DetachProgram(progExplain)
	return nil
}

func (e *Enforcer) programs() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{progFrom: e.fromSandbox, progTo: e.toSandbox, progExplain: e.explain}
}

func (e *Enforcer) writeMeta(digest [sha256.Size]byte) error {
	meta := bpf.DatapathBhMeta{
		Layout: layoutVersion, MaxSandboxes: e.cfg.MaxSandboxes, Program: digest, NextGen: e.generations.reserved(),
	}
	if err := e.maps["meta"].Put(uint32(0), meta); err != nil {
		return fmt.Errorf("write meta: %w", err)
	}
	return nil
}

// pinned lists the ids that have pinned links.
func (e *Enforcer) pinned() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(e.dir, "links"))
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var ids []string
	for _, d := range entries {
		ids = append(ids, d.Name())
	}
	return ids, nil
}
