// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// idleFlush is how long a stream is silent before text without a newline is put
// out. Prompts appear in the log, and so does the end of the output of a
// command that ends without a newline while somebody holds its pipe open.
const idleFlush = 250 * time.Millisecond

// pumpBytes is the size of one read: a pipe holds no more by default.
const pumpBytes = 64 << 10

// Source is the reading end of a pipe; *os.File in non-blocking mode is one.
type Source interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// Pump writes everything from src as the given stream until it ends, and ends
// the stream's last line. Each piece also goes to tee, if that is not nil,
// before it is written; it is valid during the call only. The error is of
// reading; nil at the end.
//
// Once the context has ended, Pump gives src no more than grace to end: some
// other process may hold the pipe for ever.
func (w *Writer) Pump(ctx context.Context, stream Stream, src Source, tee func([]byte), grace time.Duration) error {
	defer w.EndStream(stream)
	in := &deadline{src: src}
	defer context.AfterFunc(ctx, func() { in.end(grace) })()
	buf := make([]byte, pumpBytes)
	for {
		var idle time.Time
		if w.Pending(stream) {
			idle = time.Now().Add(idleFlush)
		}
		in.set(idle)
		n, err := src.Read(buf)
		if n > 0 {
			if tee != nil {
				tee(buf[:n])
			}
			w.Write(stream, buf[:n])
		}
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.FlushPartial(stream)
			if in.over() {
				return nil
			}
		case errors.Is(err, io.EOF):
			return nil
		default:
			return err
		}
	}
}

// deadline joins the two reasons to stop waiting for a source. A source that
// knows no deadlines is read to its end.
type deadline struct {
	src Source

	mu   sync.Mutex
	last time.Time // no read may go on after it; zero: unlimited
}

// set limits the next read; zero means no limit.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.last.IsZero() && (t.IsZero() || d.last.Before(t)) {
		t = d.last
	}
	_ = d.src.SetReadDeadline(t)
}

// end limits all reads from now on.
func (d *deadline) end(grace time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = time.Now().Add(grace)
	_ = d.src.SetReadDeadline(d.last)
}

func (d *deadline) over() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.last.IsZero() && !time.Now().Before(d.last)
}
