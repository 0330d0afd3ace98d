// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

// Logs implements nodev1.NodeServer.
func (s *Server) Logs(req *nodev1.LogsRequest, stream grpc.ServerStreamingServer[nodev1.LogsResponse]) error {
	ctx := stream.Context()
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return err
	}
	release, err := s.cfg.Sandboxes.Hold(rec.ID)
	if err != nil {
		return failure(err)
	}
	defer release()
	opts := logs.Options{Tail: int(req.GetTail()), Follow: req.GetFollow()}
	if opts.Tail < 0 {
		opts.Tail = logs.None
	}
	if opts.Follow {
		done := make(chan struct{}) // closed below when the sandbox has stopped
		opts.Done = done
		waitCtx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		wg.Go(func() {
			if _, err := s.cfg.Sandboxes.Wait(waitCtx, rec.ID); err == nil {
				close(done)
			}
		})
	}
	err = logs.Read(ctx, s.cfg.LogDir(rec.ID), opts, func(l logs.Line) error {
		if l.Gap {
			if err := stream.Send(&nodev1.LogsResponse{
				Stream: nodev1.Stream_STREAM_STDERR, TimeNs: unixNano(l.Time),
				Data: []byte("bulkhead: output before this was rotated away before it was read: it came faster than the reader took it\n"),
			}); err != nil {
				return err
			}
		}
		out := &nodev1.LogsResponse{Stream: nodev1.Stream_STREAM_STDOUT, TimeNs: unixNano(l.Time)}
		if l.Stream == logs.Stderr {
			out.Stream = nodev1.Stream_STREAM_STDERR
		}
		if l.Notice {
			out.Data = append(out.Data, "bulkhead: "...)
		}
		out.Data = append(out.Data, l.Text...)
		if !l.Partial {
			out.Data = append(out.Data, '\n')
		}
		return stream.Send(out)
	})
	return failure(err)
}

// session is one Exec or Attach stream: what arrives becomes a reader and
// control messages, what is written becomes messages.
type session struct {
	stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]

	mu sync.Mutex // one Send at a time
}

// sender is the io.Writer of one output stream.
type sender struct {
	s      *session
	stderr bool
}

// maxChunk is how much output one message carries.
const maxChunk = 32 << 10

func (w sender) Write(p []byte) (int, error) {
	n := 0
	for len(p) > 0 {
		chunk := p[:min(len(p), maxChunk)]
		msg := &nodev1.ExecResponse{}
		if w.stderr {
			msg.Message = &nodev1.ExecResponse_Stderr{Stderr: chunk}
		} else {
			msg.Message = &nodev1.ExecResponse_Stdout{Stdout: chunk}
		}
		if err := w.s.send(msg); err != nil {
			return n, err
		}
		n += len(chunk)
		p = p[len(chunk):]
	}
	return n, nil
}

func (s *session) send(m *nodev1.ExecResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(m)
}

// control is what can be done to the process at the other end.
type control interface {
	Resize(ctx context.Context, rows, cols uint32) error
	signal(ctx context.Context, sig syscall.Signal) error
}

// receive feeds stdin and control messages until the client ends its side. It
// returns when the client has gone or ended, with stdin closed.
func (s *session) receive(ctx context.Context, stdin *io.PipeWriter, c control) {
	defer stdin.Close()
	for {
		m, err := s.stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				stdin.CloseWithError(err)
			}
			return
		}
		switch v := m.GetMessage().(type) {
		case *nodev1.ExecRequest_Stdin:
			if _, err := stdin.Write(v.Stdin); err != nil {
				continue // the command has closed its input; control goes on
			}
		case *nodev1.ExecRequest_CloseStdin:
			stdin.Close()
		case *nodev1.ExecRequest_Resize:
			_ = c.Resize(ctx, v.Resize.GetRows(), v.Resize.GetCols()) // the terminal may be gone already
		case *nodev1.ExecRequest_Signal:
			_ = c.signal(ctx, syscall.Signal(v.Signal))
		}
	}
}

// first reads the start message.
func first(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]) (*nodev1.ExecStart, error) {
	m, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if m.GetStart() == nil {
		return nil, status.Error(codes.InvalidArgument, "the first message of the stream must be start")
	}
	return m.GetStart(), nil
}

type execControl struct{ runtime.Process }

func (c execControl) signal(ctx context.Context, sig syscall.Signal) error { return c.Kill(ctx, sig) }

// Exec implements nodev1.NodeServer. A client that goes away takes its process
// with it.
func (s *Server) Exec(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]) error {
	ctx := stream.Context()
	start, err := first(stream)
	if err != nil {
		return err
	}
	rec, _, err := s.find(ctx, start.GetRef())
	if err != nil {
		return err
	}
	if len(start.GetCommand()) == 0 {
		return status.Error(codes.InvalidArgument, "name a command")
	}
	task, err := s.cfg.Sandboxes.Task(ctx, rec.ID)
	if err != nil {
		return failure(err)
	}
	sess := &session{stream: stream}
	stdio := runtime.IO{Stdout: sender{s: sess}, Stderr: sender{s: sess, stderr: true}}
	pr, pw := io.Pipe()
	defer pr.Close()
	if start.GetStdin() {
		stdio.Stdin = pr
	}
	proc, err := task.Exec(ctx, runtime.ExecSpec{
		Command: start.GetCommand(), Env: start.GetEnv(), Workdir: start.GetWorkdir(),
		Terminal: start.GetTerminal(), Rows: start.GetRows(), Cols: start.GetCols(),
	}, stdio)
	if err != nil {
		return failure(err)
	}
	if err := sess.send(&nodev1.ExecResponse{Message: &nodev1.ExecResponse_Started{Started: true}}); err != nil {
		_ = proc.Kill(context.WithoutCancel(ctx), syscall.SIGKILL)
		return err
	}
	go sess.receive(ctx, pw, execControl{proc}) // ends with the stream: gRPC fails Recv when this handler returns
	exit, err := proc.Wait(ctx)
	if err != nil {
		if ctx.Err() != nil {
			_ = proc.Kill(context.WithoutCancel(ctx), syscall.SIGKILL)
		}
		return failure(err)
	}
	return sess.send(&nodev1.ExecResponse{Message: &nodev1.ExecResponse_ExitCode{ExitCode: int32(exit.Code)}})
}

type taskControl struct{ runtime.Task }

func (c taskControl) signal(ctx context.Context, sig syscall.Signal) error {
	return c.Kill(ctx, sig, false)
}

// Attach implements nodev1.NodeServer. A client that goes away leaves the
// command running.
func (s *Server) Attach(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]) error {
	ctx := stream.Context()
	start, err := first(stream)
	if err != nil {
		return err
	}
	rec, _, err := s.find(ctx, start.GetRef())
	if err != nil {
		return err
	}
	release, err := s.cfg.Sandboxes.Hold(rec.ID)
	if err != nil {
		return failure(err)
	}
	defer release()
	task, err := s.cfg.Sandboxes.Task(ctx, rec.ID)
	if err != nil {
		return failure(err)
	}
	sess := &session{stream: stream}
	stdio := runtime.IO{Stdout: sender{s: sess}, Stderr: sender{s: sess, stderr: true}}
	pr, pw := io.Pipe()
	defer pr.Close()
	if start.GetStdin() {
		stdio.Stdin = pr
	}
	if start.GetRows() > 0 && start.GetCols() > 0 {
		_ = task.Resize(ctx, start.GetRows(), start.GetCols())
	}
	if err := sess.send(&nodev1.ExecResponse{Message: &nodev1.ExecResponse_Started{Started: true}}); err != nil {
		return err
	}
	go sess.receive(ctx, pw, taskControl{task}) // ends with the stream, as in Exec
	if err := task.Attach(ctx, stdio); err != nil {
		return failure(err)
	}
	last, err := s.cfg.Sandboxes.Wait(ctx, rec.ID)
	if err != nil {
		return failure(err)
	}
	return sess.send(&nodev1.ExecResponse{Message: &nodev1.ExecResponse_ExitCode{ExitCode: int32(last.Exit.Code)}})
}

// chunkReader makes one reader of an import stream.
type chunkReader struct {
	stream grpc.ClientStreamingServer[nodev1.ImportImageRequest, nodev1.ImportImageResponse]
	rest   []byte
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		m, err := r.stream.Recv()
		if err != nil {
			return 0, err
		}
		r.rest = m.GetChunk()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// ImportImage implements nodev1.NodeServer.
func (s *Server) ImportImage(stream grpc.ClientStreamingServer[nodev1.ImportImageRequest, nodev1.ImportImageResponse]) error {
	ctx := stream.Context()
	if err := operator(ctx, "import images"); err != nil {
		return err
	}
	imgs, err := s.cfg.Images.Import(ctx, &chunkReader{stream: stream})
	if err != nil {
		return failure(err)
	}
	out := &nodev1.ImportImageResponse{}
	for _, i := range imgs {
		out.Images = append(out.Images, imageToProto(i))
	}
	return stream.SendAndClose(out)
}
