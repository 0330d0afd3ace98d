// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

func (c *cli) runCmd() *cobra.Command {
	var flags specFlags
	var detach bool
	cmd := &cobra.Command{
		Use:     "run [flags] IMAGE [COMMAND...]",
		Aliases: []string{"create"},
		Short:   "Start a sandbox",
		Long: `Start a sandbox and stay with it: what its command writes comes out here, byte for
byte, and its exit code is the one of this program.

INT, TERM or HUP to this program stops the sandbox with the default grace, a second one
kills it. So does a reader of the output that goes away. If the agent is restarted,
the sandbox runs on and this program goes on when the agent is back.

A sandbox that was killed for memory or for its lifetime ends with code 137, one that was
stopped with its command's own code, or 137 if that is 0. A sandbox that did not start
ends with code 1.

With --rm in the foreground it is this program that deletes the sandbox, after the last
byte of its output; with --detach it is the node.

With --publish the outside may connect to a port of the sandbox, through a port of the
node from the range that its operator allows (network.publish_ports). Answers need no
rule.`,
		Example: `  bulkhead run --tenant acme/vision alpine:3.22 echo hello
  bulkhead run -d --name web --cpus 0.5 --memory 256MiB --ttl 1h registry.example.com/web:2
  bulkhead run -d --publish 30080:80 --name web registry.example.com/web:2
  bulkhead run -it --rm alpine:3.22 sh
  OPENAI_API_KEY=... bulkhead run -e OPENAI_API_KEY --policy model-api.yaml agent:7
  tar c src | bulkhead run -i --rm builder:1 tar x -C /src`,
		Args: args(1, -1, "[flags] IMAGE [COMMAND...]"),
		RunE: func(cmd *cobra.Command, argv []string) error {
			spec, err := flags.spec(argv[0], afterDashes(argv[1:]))
			if err != nil {
				return err
			}
			c.asTenant = spec.GetTenant()
			if detach {
				spec.AutoRemove = flags.rm
				return c.runDetached(cmd, spec)
			}
			if err := c.checkTTY(flags.stdin, flags.tty); err != nil {
				return err
			}
			return c.runForeground(cmd, spec, flags.rm)
		},
	}
	flags.add(cmd.Flags())
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "do not stay with it; print its id")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (c *cli) runDetached(cmd *cobra.Command, spec *sandboxv1.Spec) error {
	node, err := c.node()
	if err != nil {
		return err
	}
	busy := c.progress("starting " + spec.GetImage())
	resp, err := node.Create(cmd.Context(), &nodev1.CreateRequest{Spec: spec})
	busy.done()
	if err != nil {
		return err
	}
	s := resp.GetSandbox()
	if c.json() {
		err = render.JSON(c.stdout, s)
	} else {
		_, err = fmt.Fprintln(c.stdout, s.GetId())
	}
	if err == nil && s.GetExit().GetReason() == sandboxv1.ExitReason_EXIT_REASON_LAUNCH_FAILED {
		return ending(s)
	}
	return err
}

// foreground is one run that this program stays with.
type foreground struct {
	c    *cli
	cmd  *cobra.Command
	node nodev1.NodeClient
	sig  chan os.Signal // from os/signal; never closed; deep enough for an impatient user

	id    string
	asked int // how often a stop was asked for
}

// outcome is how a foreground run ended.
type outcome struct {
	sandbox *sandboxv1.Sandbox
	err     error
}

func (c *cli) runForeground(cmd *cobra.Command, spec *sandboxv1.Spec, rm bool) error {
	node, err := c.node()
	if err != nil {
		return err
	}
	f := &foreground{c: c, cmd: cmd, node: node, sig: make(chan os.Signal, 16)}
	// With PIPE among them a write to a closed pipe is an error and not the
	// end of this program, which has a sandbox to stop first.
	signal.Notify(f.sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	defer signal.Stop(f.sig)
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()

	s, err := f.create(ctx, cancel, spec)
	if err != nil {
		return err
	}
	f.id = s.GetId()
	s, broken, err := f.stay(ctx, s)
	if err != nil {
		return err
	}
	if rm {
		if _, err := node.Delete(ctx, &nodev1.DeleteRequest{Ref: f.id}); err != nil && !notFound(err) {
			c.sayf(cmd, "delete %s: %s", f.id, c.explainError(err))
		}
	}
	if broken != nil {
		if errors.Is(broken, syscall.EPIPE) {
			return &exitError{code: exitPipe}
		}
		return fmt.Errorf("write output: %w; the sandbox was stopped", broken)
	}
	return ending(s)
}

// create starts the sandbox. A signal that comes meanwhile takes effect once
// the sandbox has an id to be stopped by.
func (f *foreground) create(ctx context.Context, cancel func(), spec *sandboxv1.Spec) (*sandboxv1.Sandbox, error) {
	done := make(chan outcome, 1) // one send; never closed
	busy := f.c.progress("starting " + spec.GetImage())
	defer busy.done()
	go func() {
		resp, err := f.node.Create(ctx, &nodev1.CreateRequest{Spec: spec})
		done <- outcome{resp.GetSandbox(), err}
	}()
	for {
		select {
		case o := <-done:
			return o.sandbox, o.err
		case sig := <-f.sig:
			if sig == syscall.SIGPIPE {
				continue
			}
			f.asked++
			if f.asked == 1 {
				f.c.sayf(f.cmd, "will stop it as soon as it has started; once more to leave at once")
				continue
			}
			cancel()
			return nil, &exitError{signalCode(sig), "left while the sandbox was starting; it may run on (bulkhead ls)"}
		}
	}
}

// stay brings the output here until the sandbox has stopped. broken is the
// error of a write to standard output or standard error.
func (f *foreground) stay(ctx context.Context, s *sandboxv1.Sandbox) (last *sandboxv1.Sandbox, broken, err error) {
	spec := s.GetSpec()
	end := make(chan outcome, 1)   // one send; never closed
	hangup := make(chan error, 1)  // at most one send: nobody reads the output
	refused := make(chan error, 8) // failures to ask for a stop; a stop more than this is not asked
	go func() {
		err := f.output(ctx, s)
		var werr *writeError
		if errors.As(err, &werr) {
			hangup <- werr.err
			err = nil
		}
		if err != nil {
			end <- outcome{nil, err}
			return
		}
		o := outcome{}
		o.sandbox, o.err = f.c.awaitStopped(ctx, f.node, f.id, f.notice)
		end <- o
	}()
	if spec.GetStdin() && !spec.GetTerminal() {
		go f.feed(ctx)
	}
	stop := func(graceMs int64) {
		go func() {
			if _, err := f.node.Stop(ctx, &nodev1.StopRequest{Ref: f.id, GraceMs: graceMs}); err != nil && ctx.Err() == nil {
				refused <- err
			}
		}()
	}
	if f.asked > 0 {
		stop(0)
	}
	for {
		select {
		case o := <-end:
			return o.sandbox, broken, o.err
		case broken = <-hangup:
			stop(0)
		case err := <-refused:
			f.c.sayf(f.cmd, "could not stop %s: %s", f.id, f.c.explainError(err))
		case sig := <-f.sig:
			if sig == syscall.SIGPIPE {
				continue
			}
			switch f.asked++; f.asked {
			case 1:
				stop(0)
			case 2:
				stop(-1)
			default:
				return nil, nil, &exitError{signalCode(sig), "left; sandbox " + f.id + " may run on (bulkhead stop " + f.id + ")"}
			}
		}
	}
}

// output copies what the command writes. The log is the source, because it has
// every byte from the first on; a terminal has to be attached to.
func (f *foreground) output(ctx context.Context, s *sandboxv1.Sandbox) error {
	if !s.GetSpec().GetTerminal() {
		return f.log(ctx)
	}
	start := &nodev1.ExecStart{Ref: f.id, Terminal: true, Stdin: s.GetSpec().GetStdin()}
	open := func(ctx context.Context) (execStream, error) { return f.node.Attach(ctx) }
	seen := &counter{w: f.c.stdout}
	_, err := f.c.converse(ctx, conversation{open: open, start: start, out: seen, err: f.c.stderr})
	if f.c.away(ctx, err) {
		return fmt.Errorf("the agent went away; sandbox %s runs on (bulkhead attach %s)", f.id, f.id)
	}
	if notAttachable(err) || err == nil && seen.bytes == 0 { // over before we came
		return f.log(ctx)
	}
	return err
}

// counter counts what is written to w.
type counter struct {
	w     io.Writer
	bytes int
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.bytes += n
	return n, err
}

func (f *foreground) log(ctx context.Context) error {
	l := &follower{node: f.node, req: &nodev1.LogsRequest{Ref: f.id, Follow: true}, out: splitTo(f.c.stdout, f.c.stderr)}
	return f.c.outlast(ctx, f.notice, func() error { return l.follow(ctx) })
}

// feed connects standard input of a sandbox without a terminal. Output comes
// from the log.
func (f *foreground) feed(ctx context.Context) {
	start := &nodev1.ExecStart{Ref: f.id, Stdin: true}
	open := func(ctx context.Context) (execStream, error) { return f.node.Attach(ctx) }
	_, err := f.c.converse(ctx, conversation{open: open, start: start, out: io.Discard, err: io.Discard})
	if err != nil && ctx.Err() == nil && !notAttachable(err) && !notFound(err) {
		f.c.sayf(f.cmd, "standard input is no longer connected: %s", f.c.explainError(err))
	}
}

func (f *foreground) notice(msg string) {
	f.c.sayf(f.cmd, "%s; sandbox %s runs on", msg, f.id)
}

// awaitStopped waits until the sandbox has stopped, over restarts of the agent.
func (c *cli) awaitStopped(ctx context.Context, node nodev1.NodeClient, ref string, notice func(string)) (s *sandboxv1.Sandbox, err error) {
	err = c.outlast(ctx, notice, func() error {
		resp, err := node.Wait(ctx, &nodev1.WaitRequest{Ref: ref})
		s = resp.GetSandbox()
		return err
	})
	return s, err
}

// ending turns how a sandbox ended into what this program says and returns.
func ending(s *sandboxv1.Sandbox) error {
	e := s.GetExit()
	code := int(e.GetCode())
	switch e.GetReason() {
	case sandboxv1.ExitReason_EXIT_REASON_EXITED:
		if code == 0 {
			return nil
		}
	case sandboxv1.ExitReason_EXIT_REASON_SIGNALED:
		code = 128 + int(e.GetSignal())
	case sandboxv1.ExitReason_EXIT_REASON_OOM, sandboxv1.ExitReason_EXIT_REASON_TTL:
		code = 128 + int(syscall.SIGKILL)
	case sandboxv1.ExitReason_EXIT_REASON_STOPPED:
		if code == 0 {
			code = 128 + int(syscall.SIGKILL)
		}
	default:
		code = exitFailure
	}
	return &exitError{code, render.Ending(s)}
}

func signalCode(sig os.Signal) int {
	if s, ok := sig.(syscall.Signal); ok {
		return 128 + int(s)
	}
	return exitFailure
}

// execStream is the client's side of Exec and Attach.
type execStream = grpc.BidiStreamingClient[nodev1.ExecRequest, nodev1.ExecResponse]
