// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

const (
	// slowReader is how long an attached reader may take nothing while the
	// command waits for it.
	slowReader = 10 * time.Second
	// clientDepth is how many pieces wait for an attached reader before the
	// command has to.
	clientDepth = 16
	// outputGrace is how long output may come after its process has ended:
	// another process may hold the pipe open.
	outputGrace = 2 * time.Second
)

// relay carries the streams of an interactive task: output to the log and to
// everyone attached, input from them.
type relay struct {
	r        *Runtime
	id       string
	terminal bool
	fifos    *fifos
	log      *logs.Writer
	running  bool // run was called; before that nobody else knows of the relay

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed by run's last goroutine: no output comes any more

	mu      sync.Mutex
	clients map[*attached]struct{} // nil once done
	stdin   *os.File               // nil once closed for good
}

// attached is one reader of a relay.
type attached struct {
	pieces chan piece    // closed by the relay when no more comes; depth: clientDepth
	gone   chan struct{} // closed by the reader when it leaves
	slow   chan struct{} // closed by the relay when it cuts the reader off
}

// piece is some output. All readers share its text.
type piece struct {
	stream logs.Stream
	text   []byte
}

// newRelay takes over f.
func newRelay(r *Runtime, id string, f *fifos, terminal bool, cfg logs.Config) *relay {
	ctx, cancel := context.WithCancel(r.ctx)
	return &relay{
		r: r, id: id, terminal: terminal, fifos: f,
		log:     logs.OpenWriter(cfg),
		ctx:     ctx,
		cancel:  cancel,
		done:    make(chan struct{}),
		clients: map[*attached]struct{}{},
		stdin:   f.in,
	}
}

// run starts to carry output. The shim has opened its ends by now.
func (l *relay) run(wg *sync.WaitGroup) {
	l.running = true
	l.fifos.release()
	var pumps sync.WaitGroup
	for _, s := range []struct {
		stream logs.Stream
		file   *os.File
	}{{logs.Stdout, l.fifos.out}, {logs.Stderr, l.fifos.err}} {
		if s.file == nil {
			continue
		}
		pumps.Go(func() {
			tee := func(p []byte) { l.broadcast(piece{s.stream, append([]byte(nil), p...)}) }
			if err := l.log.Pump(l.ctx, s.stream, s.file, tee, 0); err != nil && !errors.Is(err, os.ErrClosed) {
				l.r.log.Warn("relay output", "sandbox", l.id, "err", err)
			}
		})
	}
	wg.Go(func() {
		pumps.Wait()
		l.finish()
	})
}

// finish tells everyone attached that nothing more comes.
func (l *relay) finish() {
	l.cancel()
	l.mu.Lock()
	for c := range l.clients {
		close(c.pieces)
	}
	l.clients, l.stdin = nil, nil
	l.mu.Unlock()
	l.fifos.close()
	if err := l.log.Close(); err != nil {
		l.r.log.Warn("close log", "sandbox", l.id, "err", err)
	}
	close(l.done)
}

// close ends the relay before the task's output has.
func (l *relay) close() {
	l.cancel()
	if !l.running {
		l.finish()
	}
	<-l.done
}

// broadcast hands a piece to all readers. The command waits for the slowest, up
// to a limit.
func (l *relay) broadcast(p piece) {
	l.mu.Lock()
	clients := make([]*attached, 0, len(l.clients))
	for c := range l.clients {
		clients = append(clients, c)
	}
	l.mu.Unlock()
	for _, c := range clients {
		select {
		case c.pieces <- p:
			continue
		default:
		}
		limit := time.NewTimer(l.r.slowReader)
		select {
		case c.pieces <- p:
		case <-c.gone:
		case <-l.ctx.Done():
		case <-limit.C:
			l.mu.Lock()
			if _, ok := l.clients[c]; ok {
				delete(l.clients, c)
				close(c.slow)
			}
			l.mu.Unlock()
		}
		limit.Stop()
	}
}

// attach adds a reader, or answers nil if no output comes any more.
func (l *relay) attach() *attached {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.clients == nil {
		return nil
	}
	c := &attached{
		pieces: make(chan piece, clientDepth),
		gone:   make(chan struct{}),
		slow:   make(chan struct{}),
	}
	l.clients[c] = struct{}{}
	return c
}

// detach removes a reader.
func (l *relay) detach(c *attached) {
	close(c.gone)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.clients, c)
}

// serve is one attached conversation.
func (l *relay) serve(ctx context.Context, stdio runtime.IO) error {
	c := l.attach()
	if c == nil {
		return nil
	}
	defer l.detach(c)
	if stdio.Stdin != nil {
		// The reader may block for ever. When it answers, what it says is
		// dropped if we have left.
		go l.feed(c, stdio.Stdin)
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.slow:
			return runtime.ErrSlowReader
		case p, ok := <-c.pieces:
			if !ok {
				return nil
			}
			select {
			case <-c.slow:
				return runtime.ErrSlowReader // what still waits is not all
			default:
			}
			w := stdio.Stdout
			if p.stream == logs.Stderr {
				w = stdio.Stderr
			}
			if w == nil {
				continue
			}
			if _, err := w.Write(p.text); err != nil {
				return err
			}
		}
	}
}

// feed carries one reader's input until it ends or leaves.
func (l *relay) feed(c *attached, r io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		select {
		case <-c.gone:
			return
		default:
		}
		if n > 0 && !l.write(c, buf[:n]) {
			return
		}
		if err != nil {
			// A terminal's input does not end: the shim would hang up.
			if errors.Is(err, io.EOF) && !l.terminal {
				l.closeStdin()
			}
			return
		}
	}
}

// write gives input to the command, which may be slow to take it.
func (l *relay) write(c *attached, p []byte) bool {
	l.mu.Lock()
	in := l.stdin
	l.mu.Unlock()
	if in == nil {
		return false
	}
	for len(p) > 0 {
		// A deadline, not a close, so that one reader that leaves takes nothing
		// from the others.
		_ = in.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := in.Write(p)
		p = p[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		select {
		case <-c.gone:
			return false
		case <-l.ctx.Done():
			return false
		default:
		}
	}
	return true
}

// closeStdin ends the command's input for good.
func (l *relay) closeStdin() {
	l.mu.Lock()
	in := l.stdin
	l.stdin = nil
	l.mu.Unlock()
	if in == nil {
		return
	}
	in.Close()
	ctx, cancel := l.r.bound(l.ctx)
	defer cancel()
	if err := l.r.closeIO(ctx, l.id, ""); err != nil && !isNotFound(err) && ctx.Err() == nil {
		l.r.log.Warn("close stdin", "sandbox", l.id, "err", err)
	}
}
