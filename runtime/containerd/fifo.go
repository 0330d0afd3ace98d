// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// fifoBytes is how much a command may write ahead of its reader. It is the most
// that the kernel grants without privilege.
const fifoBytes = 1 << 20

// fifos are the named pipes of one process, between the shim and us.
//
// The shim opens each of its ends at both sides, so that we may come and go. We
// hold stdout and stderr open for writing until it has done that: a reader that
// comes first would see the end at once.
type fifos struct {
	dir                   string
	stdin, stdout, stderr string // paths; empty if the process has none

	in       *os.File   // write end of stdin; nil if none
	out, err *os.File   // read ends
	held     []*os.File // write ends of stdout and stderr until the shim has its own
}

// makeFIFOs makes the pipes in a new directory and opens our ends.
func makeFIFOs(dir string, stdin, stderr bool) (*fifos, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make FIFO directory: %w", err)
	}
	f := &fifos{dir: dir, stdout: filepath.Join(dir, "stdout")}
	if stdin {
		f.stdin = filepath.Join(dir, "stdin")
	}
	if stderr {
		f.stderr = filepath.Join(dir, "stderr")
	}
	for _, path := range []string{f.stdin, f.stdout, f.stderr} {
		if path == "" {
			continue
		}
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, errors.Join(fmt.Errorf("make FIFO %s: %w", path, err), os.RemoveAll(dir))
		}
	}
	for _, path := range []string{f.stdout, f.stderr} {
		if path == "" {
			continue
		}
		w, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			f.close()
			return nil, errors.Join(fmt.Errorf("open FIFO: %w", err), os.RemoveAll(dir))
		}
		// A larger pipe is a courtesy.
		_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, fifoBytes)
		f.held = append(f.held, w)
	}
	if err := f.open(); err != nil {
		f.close()
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return f, nil
}

// open opens our ends of pipes that exist. A missing pipe has nothing to say.
func (f *fifos) open() error {
	for _, p := range []struct {
		path string
		flag int
		file **os.File
	}{
		// Open for reading too, or it would fail as long as the shim has not
		// opened its end.
		{f.stdin, os.O_RDWR, &f.in},
		{f.stdout, os.O_RDONLY, &f.out},
		{f.stderr, os.O_RDONLY, &f.err},
	} {
		if p.path == "" {
			continue
		}
		file, err := os.OpenFile(p.path, p.flag|unix.O_NONBLOCK, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open FIFO: %w", err)
		}
		*p.file = file
	}
	return nil
}

// release closes what was held for the shim's sake.
func (f *fifos) release() {
	for _, w := range f.held {
		w.Close()
	}
	f.held = nil
}

// close closes all our ends. The pipes stay for whoever comes next.
func (f *fifos) close() {
	f.release()
	for _, file := range []*os.File{f.in, f.out, f.err} {
		if file != nil {
			file.Close()
		}
	}
}
