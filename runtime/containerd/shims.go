// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

const shimProgram = "containerd-shim-runc-v2"

// shims answers the pids of the shims of this containerd and namespace, by id.
// containerd may not know one: when whoever asked for a task dies at the wrong
// moment, the shim comes up after everybody has given it up.
func (r *Runtime) shims() (map[string][]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	found := map[string][]int{}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended meanwhile
		}
		args := bytes.Split(bytes.TrimRight(line, "\x00"), []byte{0})
		if filepath.Base(string(args[0])) != shimProgram || option(args, "-namespace") != r.cfg.Namespace || option(args, "-address") != r.cfg.Address {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if id := option(args, "-id"); err == nil && validID(id) {
			found[id] = append(found[id], pid)
		}
	}
	return found, nil
}

// option answers what follows a flag; "" if it is not there.
func option(args [][]byte, flag string) string {
	i := slices.IndexFunc(args, func(a []byte) bool { return string(a) == flag })
	if i < 0 || i+1 == len(args) {
		return ""
	}
	return string(args[i+1])
}

// removeShims kills the shims of an id that containerd has no task for.
func (r *Runtime) removeShims(id string) error {
	found, err := r.shims()
	if err != nil {
		return err
	}
	for _, pid := range found[id] {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill shim %d: %w", pid, err)
		}
	}
	return nil
}
