// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

// each does one thing to every sandbox named, also after one of them failed.
func (c *cli) each(cmd *cobra.Command, refs []string, do func(nodev1.NodeClient, string) error) error {
	node, err := c.node()
	if err != nil {
		return err
	}
	var failed error
	for _, ref := range refs {
		if err := do(node, ref); err != nil {
			if len(refs) == 1 || c.stdout.failed() != nil {
				return err
			}
			c.sayf(cmd, "%s: %s", render.Clean(ref), c.explainError(err))
			failed = &exitError{code: exitFailure}
		}
	}
	return failed
}

func (c *cli) stopCmd() *cobra.Command {
	var grace string
	cmd := &cobra.Command{
		Use:   "stop [--grace 10s] SANDBOX...",
		Short: "Stop sandboxes: TERM, then KILL after the grace",
		Long: `Stop sandboxes: TERM, then KILL after the grace. Returns when they have stopped and
their last usage is on disk. A sandbox that has stopped already is no error.`,
		Example: `  bulkhead stop web
  bulkhead stop --grace 1m acme/vision:train
  bulkhead stop $(bulkhead ls -q --tenant acme)`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			graceMs := int64(0)
			if grace != "" {
				d, err := parseDuration(grace)
				if err != nil {
					return usagef("--grace: %v", err)
				}
				if graceMs = (d + time.Millisecond - 1).Milliseconds(); d == 0 {
					graceMs = -1
				}
			}
			return c.stop(cmd, refs, graceMs)
		},
	}
	cmd.Flags().StringVar(&grace, "grace", "", "time between TERM and KILL; 0s kills at once (default 10s)")
	return cmd
}

func (c *cli) killCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "kill SANDBOX...",
		Short:             "Kill sandboxes at once (stop --grace 0s)",
		Example:           `  bulkhead kill web`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE:              func(cmd *cobra.Command, refs []string) error { return c.stop(cmd, refs, -1) },
	}
}

func (c *cli) stop(cmd *cobra.Command, refs []string, graceMs int64) error {
	return c.each(cmd, refs, func(node nodev1.NodeClient, ref string) error {
		busy := c.progress("stopping " + ref)
		resp, err := node.Stop(cmd.Context(), &nodev1.StopRequest{Ref: ref, GraceMs: graceMs})
		busy.done()
		if err != nil {
			return err
		}
		if c.json() {
			return render.JSON(c.stdout, resp.GetSandbox())
		}
		_, err = fmt.Fprintln(c.stdout, resp.GetSandbox().GetId())
		return err
	})
}

func (c *cli) rmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm [-f] SANDBOX...",
		Aliases: []string{"delete", "remove"},
		Short:   "Delete stopped sandboxes and their logs",
		Long: `Delete stopped sandboxes and their logs. What they used stays in the usage records.
Prints each sandbox as it was named.`,
		Example: `  bulkhead rm web
  bulkhead rm -f k3xq7m2vapd4`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(node nodev1.NodeClient, ref string) error {
				_, err := node.Delete(cmd.Context(), &nodev1.DeleteRequest{Ref: ref, Force: force})
				if err != nil {
					return err
				}
				if c.json() {
					return render.JSONFields(c.stdout, render.Field{Name: "ref", Value: ref}, render.Field{Name: "deleted", Value: true})
				}
				_, err = fmt.Fprintln(c.stdout, ref)
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop them first if they run")
	return cmd
}

func (c *cli) waitCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "wait SANDBOX...",
		Short: "Wait until sandboxes have stopped; print their exit codes",
		Long: `Wait until sandboxes have stopped and print the exit code of each on a line, in the
order given. The exit code of wait itself is 0. Restarts of the agent are waited out.`,
		Example: `  code=$(bulkhead wait job)
  bulkhead wait -o json job | jq .exit.reason`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.each(cmd, refs, func(node nodev1.NodeClient, ref string) error {
				s, err := c.awaitStopped(cmd.Context(), node, ref, func(msg string) { c.sayf(cmd, "%s", msg) })
				if err != nil {
					return err
				}
				if c.json() {
					return render.JSON(c.stdout, s)
				}
				_, err = fmt.Fprintln(c.stdout, s.GetExit().GetCode())
				return err
			})
		},
	}
}

func (c *cli) execCmd() *cobra.Command {
	var stdin, tty bool
	var env []string
	var workdir string
	cmd := &cobra.Command{
		Use:   "exec [flags] SANDBOX COMMAND...",
		Short: "Run one more command in a running sandbox",
		Long: `Run one more command in a running sandbox, under the same limits and the same policy.
Its exit code is the one of this program. Signals are passed on to it.`,
		Example: `  bulkhead exec web ps
  bulkhead exec -it web sh
  bulkhead exec -i web tar x -C /data < data.tar`,
		Args:              args(2, -1, "[flags] SANDBOX COMMAND..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, argv []string) error {
			if err := c.checkTTY(stdin, tty); err != nil {
				return err
			}
			if len(afterDashes(argv[1:])) == 0 {
				return usagef("something is missing: %s [flags] SANDBOX COMMAND...", cmd.CommandPath())
			}
			vars, err := resolveEnv(env)
			if err != nil {
				return err
			}
			if tty && !hasKey(vars, "TERM") && os.Getenv("TERM") != "" {
				vars = append(vars, "TERM="+os.Getenv("TERM"))
			}
			return c.exec(cmd, &nodev1.ExecStart{Ref: argv[0], Command: afterDashes(argv[1:]), Terminal: tty, Stdin: stdin, Env: vars, Workdir: workdir})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&stdin, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&env, "env", "e", nil, "KEY=value, or KEY to pass it on from here; may be repeated")
	f.StringVarP(&workdir, "workdir", "w", "", "directory that the command starts in")
	f.SetInterspersed(false)
	return cmd
}

func (c *cli) exec(cmd *cobra.Command, start *nodev1.ExecStart) error {
	node, err := c.node()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 16) // from os/signal; never closed; deep enough for an impatient user
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE)
	defer signal.Stop(signals)
	code, err := c.converse(cmd.Context(), conversation{
		open:  func(ctx context.Context) (execStream, error) { return node.Exec(ctx) },
		start: start, out: c.stdout, err: c.stderr, signals: signals,
	})
	return sessionEnd(code, err)
}

// sessionEnd is the end of an exec or attach.
func sessionEnd(code int, err error) error {
	switch {
	case errors.Is(err, syscall.EPIPE):
		return &exitError{code: exitPipe}
	case err != nil:
		return err
	case code != 0:
		return &exitError{code: code}
	}
	return nil
}

func (c *cli) attachCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "attach SANDBOX",
		Short: "Connect to the command of a sandbox started with -i or -t",
		Long: `Connect to the command of a sandbox that was started with -i or -t; for others there is
logs -f. Its exit code is the one of this program. TERM or HUP to this program, and INT if
the sandbox has no terminal, end the connection; the sandbox runs on.`,
		Example:           `  bulkhead attach shell`,
		Args:              args(1, 1, "SANDBOX"),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			return c.attach(cmd, refs[0])
		},
	}
}

func (c *cli) attach(cmd *cobra.Command, ref string) error {
	node, err := c.node()
	if err != nil {
		return err
	}
	got, err := node.Get(cmd.Context(), &nodev1.GetRequest{Ref: ref})
	if err != nil {
		return err
	}
	s := got.GetSandbox()
	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	left := make(chan os.Signal, 1) // from os/signal; never closed; the first is enough
	signal.Notify(left, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(left)
	go func() {
		select {
		case sig := <-left:
			cancel(&exitError{signalCode(sig), "left; sandbox " + s.GetId() + " runs on"})
		case <-ctx.Done():
		}
	}()
	code, err := c.converse(ctx, conversation{
		open:  func(ctx context.Context) (execStream, error) { return node.Attach(ctx) },
		start: &nodev1.ExecStart{Ref: s.GetId(), Terminal: s.GetSpec().GetTerminal(), Stdin: s.GetSpec().GetStdin()},
		out:   c.stdout, err: c.stderr,
	})
	var gone *exitError
	if errors.As(context.Cause(ctx), &gone) {
		return gone
	}
	if err != nil {
		return sessionEnd(code, err)
	}
	// Its end may have a reason besides the code.
	if got, err := node.Wait(cmd.Context(), &nodev1.WaitRequest{Ref: s.GetId()}); err == nil &&
		got.GetSandbox().GetExit().GetReason() != sandboxv1.ExitReason_EXIT_REASON_UNSPECIFIED {
		return ending(got.GetSandbox())
	}
	return sessionEnd(code, nil)
}

// completeSandboxes names the sandboxes for the shell's completion.
func (c *cli) completeSandboxes(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	node, err := c.node()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	resp, err := node.List(ctx, &nodev1.ListRequest{All: true})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range resp.GetSandboxes() {
		names = append(names, s.GetSpec().GetName(), s.GetId())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
