// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// currentName is the file that is written.
const currentName = "current.log"

// flushBytes is how much formatted text is gathered for one write.
const flushBytes = 64 << 10

// Config says where a Writer writes and how much it keeps.
type Config struct {
	Dir      string // made if missing
	MaxBytes int64  // of one file; below MinFileBytes it counts as that
	Files    int    // kept in all, current.log included; below 1 it counts as 1
}

// MinFileBytes is the least size at which a file is rotated: one line cut to
// MaxText and its head fit in it.
const MinFileBytes = 2 * MaxText

// Writer writes the log of one task. It never reports an error, because nobody
// could act on it and the command must not wait for it: what cannot be written
// is dropped and counted, and the count is written as a notice as soon as the
// file takes it.
//
// All methods may be called at once.
type Writer struct {
	cfg Config
	now func() time.Time

	mu      sync.Mutex
	file    *os.File          // nil: not open, tried again at the next write
	size    int64             // of file, whole lines only
	pending map[Stream]*piece // fixed two entries
	out     []byte            // formatted lines that wait for flush
	outN    int64             // lines in out
	stamp   []byte            // stampAt as written: many lines have the same
	stampAt time.Time
	lost    Lost
	told    Lost // as far as notices have been written
}

// piece is the text of a stream that no newline has ended yet.
type piece struct{ text []byte }

// Lost is output that could not be written.
type Lost struct {
	Lines int64
	Bytes int64
	Err   error // the last reason
}

// OpenWriter goes on with the log in cfg.Dir, or starts one. It succeeds even
// if the directory cannot be written now.
func OpenWriter(cfg Config) *Writer {
	cfg.MaxBytes = max(cfg.MaxBytes, MinFileBytes)
	cfg.Files = max(cfg.Files, 1)
	w := &Writer{
		cfg:     cfg,
		now:     time.Now,
		pending: map[Stream]*piece{Stdout: {}, Stderr: {}},
		out:     make([]byte, 0, flushBytes+MaxText+256),
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		w.lost.Err = err
	}
	return w
}

// Write takes what a command wrote to a stream, in pieces of any size.
func (w *Writer) Write(stream Stream, p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	pc := w.pending[stream]
	if pc == nil {
		return
	}
	at := w.now()
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		take := len(p)
		if i >= 0 {
			take = i
		}
		if room := MaxText - len(pc.text); take > room {
			pc.text = append(pc.text, p[:room]...)
			p = p[room:]
			w.put(at, stream, pc, true)
			continue
		}
		text := p[:take]
		p = p[take:]
		if i < 0 {
			pc.text = append(pc.text, text...)
			break
		}
		p = p[1:]
		if len(pc.text) > 0 {
			pc.text = append(pc.text, text...)
			text = pc.text
		}
		w.line(Line{Time: at, Stream: stream, Text: text})
		pc.text = pc.text[:0]
	}
	w.flush()
}

// FlushPartial puts out what a stream has written without a newline, as a P
// line. Call it when the stream has been silent for a moment.
func (w *Writer) FlushPartial(stream Stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if pc := w.pending[stream]; pc != nil && len(pc.text) > 0 {
		w.put(w.now(), stream, pc, true)
		w.flush()
	}
}

// Pending says whether a stream has text that FlushPartial would put out.
func (w *Writer) Pending(stream Stream) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	pc := w.pending[stream]
	return pc != nil && len(pc.text) > 0
}

// EndStream puts out the last text of a stream that is over. If no newline
// ended it, a P line is the stream's last, so that a reader can tell.
func (w *Writer) EndStream(stream Stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endStream(stream)
	w.flush()
}

func (w *Writer) endStream(stream Stream) {
	if pc := w.pending[stream]; pc != nil && len(pc.text) > 0 {
		w.put(w.now(), stream, pc, true)
	}
}

// Lost answers what has been dropped so far.
func (w *Writer) Lost() Lost {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost
}

// Close puts out what is pending and closes the file. The Writer must not be used after
// it.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endStream(Stdout)
	w.endStream(Stderr)
	w.flush()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

// put writes the text of pc as one line and empties it.
func (w *Writer) put(at time.Time, stream Stream, pc *piece, partial bool) {
	w.line(Line{Time: at, Stream: stream, Partial: partial, Text: pc.text})
	pc.text = pc.text[:0]
}

// line formats one line and flushes when enough is gathered.
func (w *Writer) line(l Line) {
	if !l.Time.Equal(w.stampAt) || w.stamp == nil {
		w.stamp, w.stampAt = l.Time.UTC().AppendFormat(w.stamp[:0], timeLayout), l.Time
	}
	w.out = appendRest(append(w.out, w.stamp...), l)
	w.outN++
	if len(w.out) >= flushBytes {
		w.flush()
	}
}

// flush writes what is gathered, or drops it and counts it.
func (w *Writer) flush() {
	unsaid := w.lost.Lines > w.told.Lines
	if len(w.out) == 0 && !unsaid {
		return
	}
	if err := w.tryFlush(unsaid); err != nil {
		w.lost.Lines += w.outN
		w.lost.Bytes += int64(len(w.out))
		w.lost.Err = err
	}
	w.out, w.outN = w.out[:0], 0
}

func (w *Writer) tryFlush(unsaid bool) error {
	if w.file == nil {
		if err := w.open(); err != nil {
			return err
		}
	}
	if w.size > 0 && w.size+int64(len(w.out)) > w.cfg.MaxBytes {
		if err := w.rotate(); err != nil {
			return err
		}
	}
	if unsaid {
		n, b := w.lost.Lines-w.told.Lines, w.lost.Bytes-w.told.Bytes
		text := fmt.Appendf(nil, "dropped %d log lines (%d bytes) before this: %s", n, b, reason(w.lost.Err))
		if err := w.writeAll(AppendLine(nil, Line{Time: w.now(), Stream: Stderr, Notice: true, Text: text})); err != nil {
			return err
		}
		w.told = w.lost
	}
	return w.writeAll(w.out)
}

// reason is the bare cause: paths of the node do not belong in a tenant's log.
func reason(err error) string {
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		err = pe.Err
	case errors.As(err, &le):
		err = le.Err
	}
	if err == nil {
		return "unknown"
	}
	return strings.ReplaceAll(err.Error(), "\n", " ")
}

// writeAll writes b whole or not at all.
func (w *Writer) writeAll(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := w.file.Write(b)
	if err == nil {
		w.size += int64(n)
		return nil
	}
	if n > 0 {
		if terr := w.file.Truncate(w.size); terr != nil {
			// The torn line stays. Opening again ends it.
			w.file.Close()
			w.file = nil
		}
	}
	return err
}

// open opens current.log and ends a line that a crash has torn.
func (w *Writer) open() error {
	if err := os.MkdirAll(w.cfg.Dir, 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(w.cfg.Dir, currentName), os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	size := st.Size()
	if size > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, size-1); err != nil {
			f.Close()
			return err
		}
		if last[0] != '\n' {
			if _, err := f.Write([]byte{'\n'}); err != nil {
				f.Close()
				return err
			}
			size++
		}
	}
	w.file, w.size = f, size
	return nil
}

// rotate gives current.log the next number, removes the oldest files and opens
// a new current.log.
func (w *Writer) rotate() error {
	files, err := rotated(w.cfg.Dir)
	if err != nil {
		return err
	}
	var next uint64 = 1
	if len(files) > 0 {
		next = files[len(files)-1].Seq + 1
	}
	if err := os.Rename(filepath.Join(w.cfg.Dir, currentName), filepath.Join(w.cfg.Dir, rotatedName(next))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.file.Close()
	w.file, w.size = nil, 0
	// One of the kept files is current.log, one the file just rotated.
	for drop := len(files) + 1 - (w.cfg.Files - 1); drop > 0; drop-- {
		name := rotatedName(next)
		if len(files) > 0 {
			name, files = files[0].name(), files[1:]
		}
		if err := os.Remove(filepath.Join(w.cfg.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return w.open()
}

// rotatedName of a sequence number.
func rotatedName(seq uint64) string { return fmt.Sprintf("%08d.log", seq) }

// parseRotated answers the number of a rotated file's name.
func parseRotated(name string) (uint64, bool) {
	num, ok := strings.CutSuffix(name, ".log")
	if !ok || len(num) < 8 {
		return 0, false
	}
	seq, err := strconv.ParseUint(num, 10, 64)
	if err != nil || seq == 0 || rotatedName(seq) != name {
		return 0, false
	}
	return seq, true
}
