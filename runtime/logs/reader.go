// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// pollInterval is how often a follower looks for more.
const pollInterval = 50 * time.Millisecond

// File is one log file.
type File struct {
	Path string
	Seq  uint64 // grows with every rotation; 0 is current.log, the newest
	Size int64

	info fs.FileInfo
}

func (f File) name() string { return filepath.Base(f.Path) }

// List answers the files of a directory, oldest first. A missing directory has
// none.
func List(dir string) ([]File, error) {
	for {
		// A rotation between the two looks at current.log would hide a file.
		before, err := statCurrent(dir)
		if err != nil {
			return nil, err
		}
		files, err := rotated(dir)
		if err != nil {
			return nil, err
		}
		after, err := statCurrent(dir)
		if err != nil {
			return nil, err
		}
		switch {
		case before == nil && after == nil:
			return files, nil
		case before != nil && after != nil && os.SameFile(before, after):
			return append(files, File{Path: filepath.Join(dir, currentName), Size: after.Size(), info: after}), nil
		}
	}
}

// statCurrent answers nil if there is no current.log.
func statCurrent(dir string) (fs.FileInfo, error) {
	st, err := os.Stat(filepath.Join(dir, currentName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list logs: %w", err)
	}
	return st, nil
}

// rotated lists the rotated files alone, oldest first.
func rotated(dir string) ([]File, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list logs: %w", err)
	}
	var files []File
	for _, e := range entries {
		seq, ok := parseRotated(e.Name())
		if !ok {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		files = append(files, File{Path: filepath.Join(dir, e.Name()), Seq: seq, Size: info.Size(), info: info})
	}
	slices.SortFunc(files, func(a, b File) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1
	})
	return files, nil
}

// Special values of Options.Tail.
const (
	All  = 0
	None = -1
)

// Options of Read.
type Options struct {
	Tail   int       // this many last whole lines, or All, or None
	Since  time.Time // lines at or after it; zero: all
	Stream Stream    // empty: both
	Follow bool      // wait for more until the context or Done ends it
	// Done, when closed, ends a Follow after everything written by then has
	// been read. The caller closes it when the task is over.
	Done <-chan struct{}
}

// Read calls fn for the lines of a task's log, oldest first. Text is valid
// during the call only. Malformed lines are passed over. Read ends with fn's
// error, the context's, or nil at the end.
func Read(ctx context.Context, dir string, opts Options, fn func(Line) error) error {
	r := &reader{dir: dir, opts: opts, fn: fn}
	defer r.close()
	if err := r.seek(); err != nil {
		return err
	}
	for {
		// Done is looked at before reading: what was written before it was
		// closed is then certainly read.
		done := r.done()
		if err := r.readRest(ctx); err != nil {
			return err
		}
		if !opts.Follow || done {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-opts.Done:
		case <-time.After(pollInterval):
		}
	}
}

// Copy writes the text of a log as the command wrote it: a newline ends whole
// lines only. Notices go to stderr. A nil writer drops.
func Copy(ctx context.Context, dir string, opts Options, stdout, stderr io.Writer) error {
	var buf []byte
	return Read(ctx, dir, opts, func(l Line) error {
		w := stdout
		buf = buf[:0]
		if l.Stream == Stderr {
			w = stderr
		}
		if l.Notice {
			buf = append(buf, "bulkhead-log: "...)
		}
		if w == nil {
			return nil
		}
		buf = append(buf, l.Text...)
		if !l.Partial {
			buf = append(buf, '\n')
		}
		_, err := w.Write(buf)
		return err
	})
}

// reader is a place in a task's log.
type reader struct {
	dir  string
	opts Options
	fn   func(Line) error

	file *os.File
	buf  []byte // what of file has been read and is not a whole line yet
	skip bool   // the line in buf is too long and is passed over
	gap  bool   // the next line comes after lost ones
	last uint64 // number of the newest rotated file that was read whole
	long []byte // scratch
}

func (r *reader) done() bool {
	select {
	case <-r.opts.Done:
		return true
	default:
		return false
	}
}

func (r *reader) close() {
	if r.file != nil {
		r.file.Close()
	}
}

// seek opens the file that holds the first wanted line.
func (r *reader) seek() error {
	for {
		files, err := List(r.dir)
		if err != nil || len(files) == 0 {
			return err
		}
		file, off, err := r.tailStart(files)
		if errors.Is(err, errRotated) {
			continue
		}
		if err != nil {
			return err
		}
		if err := r.openAt(file, off); !errors.Is(err, errRotated) {
			return err
		}
	}
}

// errRotated: a name means another file than it did; look again.
var errRotated = errors.New("rotated meanwhile")

// tailStart answers where the first wanted line is.
func (r *reader) tailStart(files []File) (File, int64, error) {
	newest := files[len(files)-1]
	switch r.opts.Tail {
	case All:
		return files[0], 0, nil
	case None:
		return newest, newest.Size, nil
	}
	want := r.opts.Tail
	first, off := newest, newest.Size
	for _, f := range slices.Backward(files) {
		starts, err := lastLines(f, want, r.opts)
		if err != nil {
			return File{}, 0, err
		}
		if len(starts) > 0 {
			first, off = f, starts[0]
		}
		if want -= len(starts); want == 0 {
			break
		}
	}
	return first, off, nil
}

// openFile opens f, or answers errRotated if its name is another's by now.
func openFile(f File) (*os.File, error) {
	file, err := os.Open(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errRotated
	}
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	st, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("stat log: %w", err)
	}
	if !os.SameFile(st, f.info) {
		file.Close()
		return nil, errRotated
	}
	return file, nil
}

func (r *reader) openAt(f File, off int64) error {
	file, err := openFile(f)
	if err != nil {
		return err
	}
	if _, err := file.Seek(off, io.SeekStart); err != nil {
		file.Close()
		return fmt.Errorf("seek log: %w", err)
	}
	r.file, r.buf, r.skip = file, r.buf[:0], false
	if f.Seq > 0 {
		r.last = f.Seq - 1
	}
	return nil
}

// lastLines answers where the last lines of a file start, oldest first, at most
// max of them. A line that no newline has ended is one, too.
func lastLines(file File, max int, opts Options) ([]int64, error) {
	f, err := openFile(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var (
		ring  []int64
		head  int
		off   int64
		start = map[Stream]int64{} // where the open line of a stream began
		br    = bufio.NewReaderSize(f, maxLine)
	)
	add := func(at int64) {
		if len(ring) < max {
			ring = append(ring, at)
			return
		}
		ring[head] = at
		head = (head + 1) % max
	}
	for {
		b, err := br.ReadSlice('\n')
		at := off
		off += int64(len(b))
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			break // the end, or a line that is still written
		}
		l, err := ParseLine(b)
		if err != nil || !wanted(l, opts) {
			continue
		}
		begin, open := start[l.Stream]
		if !open {
			begin = at
		}
		if l.Partial {
			start[l.Stream] = begin
			continue
		}
		delete(start, l.Stream)
		add(begin)
	}
	for _, begin := range slices.Sorted(maps.Values(start)) {
		add(begin)
	}
	return append(slices.Clone(ring[head:]), ring[:head]...), nil
}

func wanted(l Line, opts Options) bool {
	return (opts.Stream == "" || l.Stream == opts.Stream) && !l.Time.Before(opts.Since)
}

// readRest reads to the end of what is there, over rotations.
func (r *reader) readRest(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if r.file == nil {
			opened, err := r.openNext()
			if err != nil || !opened {
				return err
			}
		}
		// The order matters: only a file that is known to be rotated before it
		// is read to its end is read whole.
		old, seq, err := r.isRotated()
		if err != nil {
			return err
		}
		if err := r.drain(ctx); err != nil {
			return err
		}
		if !old {
			return nil
		}
		if seq > 0 {
			r.last = seq
		} else {
			r.gap = true // it has been removed; so may others have been
		}
		r.file.Close()
		r.file, r.buf = nil, r.buf[:0]
	}
}

// isRotated says whether the open file is no longer current.log, and its
// number, 0 if it has none any more.
func (r *reader) isRotated() (bool, uint64, error) {
	mine, err := r.file.Stat()
	if err != nil {
		return false, 0, fmt.Errorf("stat log: %w", err)
	}
	cur, err := os.Stat(filepath.Join(r.dir, currentName))
	if err == nil && os.SameFile(mine, cur) {
		return false, 0, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, 0, fmt.Errorf("stat log: %w", err)
	}
	files, err := rotated(r.dir)
	if err != nil {
		return false, 0, err
	}
	for _, f := range slices.Backward(files) {
		if st, err := os.Stat(f.Path); err == nil && os.SameFile(mine, st) {
			return true, f.Seq, nil
		}
	}
	return true, 0, nil
}

// openNext opens the file after the last one that was read whole.
func (r *reader) openNext() (bool, error) {
again:
	for {
		files, err := List(r.dir)
		if err != nil {
			return false, err
		}
		for _, f := range files {
			if f.Seq != 0 && f.Seq <= r.last {
				continue
			}
			gap := r.last > 0 && f.Seq > r.last+1
			switch err := r.openAt(f, 0); {
			case errors.Is(err, errRotated):
				continue again
			case err != nil:
				return false, err
			}
			r.gap = r.gap || gap
			return true, nil
		}
		return false, nil
	}
}

// drain reads the open file to its present end.
func (r *reader) drain(ctx context.Context) error {
	if r.long == nil {
		r.long = make([]byte, 64<<10)
	}
	for {
		n, err := r.file.Read(r.long)
		if n > 0 {
			if ferr := r.feed(r.long[:n]); ferr != nil {
				return ferr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// feed splits what was read into lines.
func (r *reader) feed(p []byte) error {
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			if !r.skip {
				r.buf = append(r.buf, p...)
			}
			if len(r.buf) > maxLine {
				r.skip, r.buf = true, r.buf[:0]
			}
			return nil
		}
		line := p[:i]
		p = p[i+1:]
		if len(r.buf) > 0 {
			r.buf = append(r.buf, line...)
			line = r.buf
		}
		skip := r.skip || len(line) > maxLine
		r.skip = false
		if !skip {
			if err := r.emit(line); err != nil {
				return err
			}
		}
		r.buf = r.buf[:0]
	}
	return nil
}

func (r *reader) emit(b []byte) error {
	if l, err := ParseLine(b); err == nil && wanted(l, r.opts) {
		l.Gap, r.gap = r.gap, false
		return r.fn(l)
	}
	return nil // malformed lines are passed over
}
