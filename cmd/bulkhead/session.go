// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// conversation is one Exec or Attach.
type conversation struct {
	open    func(context.Context) (execStream, error)
	start   *nodev1.ExecStart
	out     io.Writer
	err     io.Writer
	signals <-chan os.Signal // passed on to the command; nil for none
}

// sender sends from several goroutines; a stream allows only one.
type sender struct {
	mu     sync.Mutex
	stream execStream
}

func (s *sender) send(m *nodev1.ExecRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(m)
}

// converse speaks with a command until it has ended, and answers its exit
// code. With start.Terminal and start.Stdin the terminal on standard input is
// raw meanwhile, and as before afterwards, however this ends. The goroutine that
// reads standard input cannot be woken and stays until the process ends.
func (c *cli) converse(ctx context.Context, v conversation) (code int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if v.start.GetTerminal() {
		v.start.Rows, v.start.Cols = c.size()
	}
	stream, err := v.open(ctx)
	if err != nil {
		return 0, err
	}
	s := &sender{stream: stream}
	if err := s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Start{Start: v.start}}); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	if v.start.GetTerminal() {
		go c.resizes(ctx, s)
	}
	if v.start.GetTerminal() && v.start.GetStdin() {
		restore, err := c.raw()
		if err != nil {
			return 0, err
		}
		defer restore()
	}
	if v.start.GetStdin() {
		go pump(c.stdin, s)
	}
	if v.signals != nil {
		go forward(ctx, v.signals, s)
	}
	var broken error
	write := func(w io.Writer, p []byte) {
		if broken != nil {
			return
		}
		if _, broken = w.Write(p); broken != nil {
			// What the kernel would tell a command whose reader is gone.
			_ = s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Signal{Signal: int32(syscall.SIGPIPE)}})
		}
	}
	for {
		m, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0, errors.New("the agent ended the session without an exit code")
		case err != nil && broken != nil:
			return 0, &writeError{broken}
		case err != nil:
			return 0, err
		}
		switch m := m.GetMessage().(type) {
		case *nodev1.ExecResponse_Stdout:
			write(v.out, m.Stdout)
		case *nodev1.ExecResponse_Stderr:
			write(v.err, m.Stderr)
		case *nodev1.ExecResponse_ExitCode:
			if broken != nil {
				return 0, &writeError{broken}
			}
			return int(m.ExitCode), nil
		}
	}
}

func pump(from io.Reader, s *sender) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Stdin{Stdin: buf[:n]}}) != nil {
				return
			}
		}
		if err != nil {
			_ = s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_CloseStdin{CloseStdin: true}})
			return
		}
	}
}

func forward(ctx context.Context, signals <-chan os.Signal, s *sender) {
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-signals:
			if n, ok := sig.(syscall.Signal); ok && n != syscall.SIGPIPE {
				_ = s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Signal{Signal: int32(n)}})
			}
		}
	}
}

// resizes tells of every change of the terminal's size.
func (c *cli) resizes(ctx context.Context, s *sender) {
	winch := make(chan os.Signal, 1) // the last change is enough
	signal.Notify(winch, syscall.SIGWINCH)
	defer signal.Stop(winch)
	for {
		select {
		case <-ctx.Done():
			return
		case <-winch:
			if rows, cols := c.size(); rows > 0 {
				_ = s.send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Resize{Resize: &nodev1.Resize{Rows: rows, Cols: cols}}})
			}
		}
	}
}

// terminal is f's descriptor if it is a terminal.
func terminal(f *os.File) (fd int, ok bool) {
	if f == nil || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	return int(f.Fd()), true
}

func asFile(v any) *os.File {
	f, _ := v.(*os.File)
	return f
}

// checkTTY refuses -it where there is no terminal to lend.
func (c *cli) checkTTY(stdin, tty bool) error {
	if _, ok := terminal(asFile(c.stdin)); stdin && tty && !ok {
		return usagef("-it needs a terminal on standard input; leave -t out in a pipe")
	}
	return nil
}

// size of the terminal, zero if there is none.
func (c *cli) size() (rows, cols uint32) {
	for _, f := range []*os.File{c.stdout.file(), asFile(c.stdin)} {
		if fd, ok := terminal(f); ok {
			if w, h, err := term.GetSize(fd); err == nil {
				return uint32(h), uint32(w)
			}
		}
	}
	return 0, 0
}

// raw makes the terminal on standard input raw.
func (c *cli) raw() (restore func(), err error) {
	fd, ok := terminal(asFile(c.stdin))
	if !ok {
		return func() {}, nil
	}
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("make the terminal raw: %w", err)
	}
	return func() { _ = term.Restore(fd, old) }, nil
}

func notFound(err error) bool { return status.Code(err) == codes.NotFound }

// notAttachable says that the command is over already.
func notAttachable(err error) bool { return status.Code(err) == codes.FailedPrecondition }

// progress is one line on a terminal about something slow; it shows up only
// after a while and is gone afterwards. In a pipe it is nothing.
type progress struct {
	mu    sync.Mutex
	w     io.Writer // nil: not on a terminal
	text  string
	shown bool
	timer *time.Timer
}

func (c *cli) progress(text string) *progress {
	p := &progress{text: text}
	_, out := terminal(c.stdout.file())
	_, errs := terminal(asFile(c.stderr))
	if !out || !errs || c.quiet || c.json() {
		return p
	}
	p.w = c.stderr
	p.timer = time.AfterFunc(300*time.Millisecond, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.w != nil {
			p.shown = true
			p.draw()
		}
	})
	return p
}

func (p *progress) draw() { fmt.Fprintf(p.w, "\r\x1b[K%s ...", p.text) }

func (p *progress) set(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.text = text; p.shown && p.w != nil {
		p.draw()
	}
}

func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.w, p.shown = nil, false
}
