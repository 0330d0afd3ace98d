// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// writeFile writes a control file in one system call, as the kernel wants it.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err = gone(errors.Join(err, f.Close())); err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}

// readText reads a control file. It makes the bare system calls: figures are
// read for every sandbox every second, and an os.File costs more than the read.
func readText(path string) (string, error) {
	fd, err := openRetry(path)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var small [4096]byte
	text := small[:0]
	for {
		if len(text) == cap(text) {
			text = append(text, 0)[:len(text)]
		}
		n, err := unix.Read(fd, text[len(text):cap(text)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return "", gone(&fs.PathError{Op: "read", Path: path, Err: err})
		case n == 0:
			return string(bytes.TrimSpace(text)), nil
		default:
			text = text[:len(text)+n]
		}
	}
}

func openRetry(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// gone makes what the kernel says of a cgroup that was removed while its file
// was open into fs.ErrNotExist.
func gone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func readWords(path string) ([]string, error) {
	s, err := readText(path)
	return strings.Fields(s), err
}

func readUint(path string) (uint64, error) {
	s, err := readText(path)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

func readInt(path string) (int64, error) {
	s, err := readText(path)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// readKeys reads a flat keyed file: cpu.stat, memory.events, cgroup.events.
func readKeys(path string) (map[string]uint64, error) {
	s, err := readText(path)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return keys, nil
}

// parseKeys reads lines of a key and a number. A line that is not of that
// form, or a key that comes twice, is an error: nothing that was not there is
// taken for zero.
func parseKeys(text string) (map[string]uint64, error) {
	keys := map[string]uint64{}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		key, value, ok := strings.Cut(line, " ")
		if !ok || key == "" {
			return nil, fmt.Errorf("line %q is not a key and a number", line)
		}
		v, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", line, err)
		}
		if _, twice := keys[key]; twice {
			return nil, fmt.Errorf("key %q comes twice", key)
		}
		keys[key] = v
	}
	return keys, nil
}

// readPIDs reads cgroup.procs. Processes of a pid namespace that this process
// cannot see show as 0 and are left out.
func readPIDs(path string) ([]int, error) {
	s, err := readText(path)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a threaded cgroup; its processes show further up
	}
	if err != nil {
		return nil, err
	}
	pids, err := parsePIDs(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return pids, nil
}

func parsePIDs(text string) ([]int, error) {
	var pids []int
	for line := range strings.Lines(text) {
		p, err := strconv.Atoi(strings.TrimRight(line, "\n"))
		if err != nil || p < 0 {
			return nil, fmt.Errorf("line %q is not a process", line)
		}
		if p != 0 {
			pids = append(pids, p)
		}
	}
	return pids, nil
}
