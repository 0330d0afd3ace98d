// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// What callers ask of an error.
var (
	ErrFull     = errors.New("spool is full")
	ErrLocked   = errors.New("spool is in use by another process")
	ErrConflict = errors.New("usage record is already spooled with another content")
	ErrSkipped  = errors.New("usage record skips a number of its meter")
	ErrPruned   = errors.New("usage records are acknowledged and gone")
	ErrTooLarge = errors.New("batch is larger than half of the spool")
	ErrUnknown  = errors.New("node_seq was never spooled")
	ErrClosed   = errors.New("spool is closed")
)

// CorruptError says that the disk does not hold what was once durable. Nothing
// has been changed. Usage is missing: do not delete the directory, keep a copy
// for the accounts.
type CorruptError struct {
	File   string
	Offset int64
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("spool is corrupt: %s at offset %d: %s", e.File, e.Offset, e.Reason)
}

// Defaults and bounds of Config.
const (
	DefaultLimitBytes   = 1 << 30
	DefaultSegmentBytes = 16 << 20
	minSegmentBytes     = 4 << 10
	segmentsInLimit     = 4 // a limit holds at least so many segments
	maxGroupBytes       = 4 << 20
)

// Config says where the spool is and how large it may grow.
type Config struct {
	Dir          string // required; made if it is not there
	NodeID       string // required; a directory belongs to one node for ever
	LimitBytes   int64  // bound on the size of all segments; 0: DefaultLimitBytes
	SegmentBytes int64  // size at which a new segment is begun; 0: DefaultSegmentBytes, at most a quarter of the limit

	// Fault, if set, is called before each change of the disk with the name of
	// the step, such as "append:fsync", and the file. An error makes the step
	// fail with it; a write then leaves half of its bytes. For tests.
	Fault func(op, path string) error
}

// Status is what the spool holds now.
type Status struct {
	First uint64 // lowest node_seq kept; Last+1 if none is
	Last  uint64 // highest node_seq; 0 if there never was one
	Acked uint64 // acknowledged up to and including
	Bytes int64
	Limit int64
	Full  bool  // the last append was refused for lack of room
	Err   error // the disk refuses to be repaired since a failed write; nil if all is well
}

// Recovered is what Open had to put right.
type Recovered struct {
	TornFile  string // segment with an unfinished write; "" if none
	TornBytes int64  // how much of it was cut off
	AckLost   bool   // the acknowledgement file was unreadable: everything kept is sent again
}

// Spool is an open spool directory. Its methods may be called concurrently.
type Spool struct {
	cfg       Config
	lock      *os.File
	recovered Recovered

	io       sync.Mutex // held by whoever changes the directory
	file     *os.File   // newest segment
	written  int64      // end of what was written to file; its segment's size is what is durable
	index    index
	mustRoll bool // file may not be appended to any more
	dirty    bool // file has bytes behind the durable end that must go first

	mu       sync.Mutex
	segments []*segment // oldest first; the last one is file
	last     uint64
	acked    uint64
	lastHash [32]byte
	bytes    int64 // of all segments
	full     bool
	broken   error
	closed   bool
	changed  chan struct{} // closed and replaced when records became durable
	waiting  []*request
	leading  bool // some append is writing
	place    place
}

// place is where the last Read stopped, so that the next one need not search.
type place struct {
	segment uint64 // its first
	seq     uint64 // next record
	offset  int64  // of the frame that holds it
}

// Status never blocks on the disk.
func (s *Spool) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Status{
		First: s.segments[0].first, Last: s.last, Acked: s.acked,
		Bytes: s.bytes, Limit: s.cfg.LimitBytes, Full: s.full, Err: s.broken,
	}
}

// Recovered says what Open had to put right.
func (s *Spool) Recovered() Recovered { return s.recovered }

// Changed answers a channel that is closed when records become durable after
// the call. Ask for it before reading, then read, then wait.
func (s *Spool) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Close waits for the write in progress and lets go of the directory. Appends
// that come later answer ErrClosed.
func (s *Spool) Close() error {
	s.mu.Lock()
	already := s.closed
	s.closed = true
	s.mu.Unlock()
	if already {
		return nil
	}
	s.io.Lock()
	defer s.io.Unlock()
	err := s.file.Close()
	return errors.Join(err, s.lock.Close())
}

// step runs the fault hook.
func (s *Spool) step(op, path string) error {
	if s.cfg.Fault == nil {
		return nil
	}
	if err := s.cfg.Fault(op, path); err != nil {
		return fmt.Errorf("%s %s: %w", op, path, err)
	}
	return nil
}

// write puts b at off. An error leaves any part of it, also an injected one.
func (s *Spool) write(op string, f *os.File, b []byte, off int64) error {
	if err := s.step(op, f.Name()); err != nil {
		if _, werr := f.WriteAt(b[:len(b)/2], off); werr != nil {
			return errors.Join(err, werr)
		}
		return err
	}
	if _, err := f.WriteAt(b, off); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

func (s *Spool) sync(op string, f *os.File) error {
	if err := s.step(op, f.Name()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

func (s *Spool) syncDir(op string) error {
	if err := s.step(op, s.cfg.Dir); err != nil {
		return err
	}
	if err := syncDir(s.cfg.Dir); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// replace puts content at path, whole or not at all, and durably: temporary
// file, fsync, rename, fsync of the directory. Steps are named kind:write and
// so on. If the error comes from the last step the file may be there. The
// answer is the open file.
func (s *Spool) replace(kind, path string, content []byte) (*os.File, error) {
	tmp := path + tempSuffix
	if err := s.step(kind+":create", tmp); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s:create: %w", kind, err)
	}
	err = s.write(kind+":write", f, content, 0)
	if err == nil {
		err = s.sync(kind+":fsync", f)
	}
	if err == nil {
		err = s.step(kind+":rename", path)
	}
	if err == nil {
		if err = os.Rename(tmp, path); err != nil {
			err = fmt.Errorf("%s:rename: %w", kind, err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(tmp))
	}
	if err := s.syncDir(kind + ":dirsync"); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockDir takes the directory for this process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open spool lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, errors.Join(fmt.Errorf("lock spool %s: %w", dir, err), f.Close())
	}
	return f, nil
}
