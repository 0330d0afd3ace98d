// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// threadNetns names the network namespace of the calling thread.
const threadNetns = "/proc/thread-self/ns/net"

// onThread runs f on a thread of its own that f may move to another network
// namespace. A thread that cannot be brought back ends with f.
func onThread(f func() error) error {
	done := make(chan error) // f's answer; never closed
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(threadNetns)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own netns: %w", err)
			return
		}
		err = f()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- errors.Join(err, home.Close())
	}()
	return <-done
}

// inNetns runs f on a thread in the namespace of an open file.
func inNetns(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter netns %s: %w", ns.Name(), err)
		}
		return f()
	})
}

// inside is a sandbox's namespace, held open, and a socket in it.
type inside struct {
	ns *os.File
	rt *conn
}

func (in *inside) close() error {
	return errors.Join(in.rt.close(), in.ns.Close())
}

// ensureNetns opens the namespace of a sandbox, making it if it is missing.
func (m *Manager) ensureNetns(id string) (*inside, error) {
	path := m.NetnsPath(id)
	in := &inside{}
	if isNetns(path) {
		ns, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open netns: %w", err)
		}
		in.ns = ns
		err = inNetns(ns, func() (err error) {
			if err := insideSysctls(); err != nil {
				return err
			}
			in.rt, err = dial()
			return err
		})
		if err != nil {
			return nil, errors.Join(err, ns.Close())
		}
		return in, nil
	}
	// A file with nothing mounted on it is what a crash leaves.
	if err := removeNetnsFile(path); err != nil {
		return nil, err
	}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make netns: %w", err)
		}
		if err := insideSysctls(); err != nil {
			return err
		}
		ns, err := os.Open(threadNetns)
		if err != nil {
			return fmt.Errorf("open new netns: %w", err)
		}
		if err := m.name(path); err != nil {
			return errors.Join(err, ns.Close())
		}
		if in.rt, err = dial(); err != nil {
			return errors.Join(err, ns.Close())
		}
		in.ns = ns
		return nil
	})
	if err != nil {
		return nil, err
	}
	return in, nil
}

// name mounts the thread's namespace on a new file.
func (m *Manager) name(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make netns file: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("make netns file: %w", err)
	}
	if err := m.failpoint("netns file"); err != nil {
		return err
	}
	if err := unix.Mount(threadNetns, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount netns on %s: %w", path, err)
	}
	return nil
}

func isNetns(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// removeNetnsFile takes away the mounts and the file; nil if there are none.
func removeNetnsFile(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue // a mount may lie under this one
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		return fmt.Errorf("unmount netns %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove netns file: %w", err)
	}
	return nil
}

// netnsFiles answers the ids that have a file.
func (m *Manager) netnsFiles() ([]string, error) {
	entries, err := os.ReadDir(m.cfg.NetnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list netns files: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if validID(e.Name()) {
			ids = append(ids, filepath.Base(e.Name()))
		}
	}
	return ids, nil
}
