// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/agext/levenshtein"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

const defaultSocket = "/run/bulkhead/agent.sock"

// Exit codes, besides a command's own.
const (
	exitFailure = 1
	exitUsage   = 2
	exitDenied  = 3   // explain --exit-code
	exitPipe    = 141 // nobody reads the output any more, as a shell reports SIGPIPE
)

// cli is one invocation.
type cli struct {
	stdin  io.Reader
	stdout *sink
	stderr io.Writer

	socket string
	output string
	quiet  bool

	dials    atomic.Int64 // connections made; waiting commands see by it that an agent came back
	dialErr  atomic.Pointer[dialError]
	to       peer // whom we speak to
	conn     *grpc.ClientConn
	asTenant string // who asks, to be named in a refusal
}

// run is main without the process around it.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{stdin: stdin, stdout: &sink{w: stdout}, stderr: stderr}
	root := c.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	if c.conn != nil {
		c.conn.Close()
	}
	return c.finish(cmd, err)
}

// finish tells of err and picks the exit code.
func (c *cli) finish(cmd *cobra.Command, err error) int {
	var exit *exitError
	if werr := c.stdout.failed(); werr != nil && (err == nil || errors.Is(err, werr)) {
		if errors.Is(werr, syscall.EPIPE) {
			return exitPipe
		}
		err = fmt.Errorf("write standard output: %w", werr)
	}
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.msg != "" {
			c.sayf(cmd, "%s", exit.msg)
		}
		return exit.code
	}
	c.sayf(cmd, "%s", c.explainError(err))
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailure
}

// sayf writes one line to standard error under the name of the command.
func (c *cli) sayf(cmd *cobra.Command, format string, args ...any) {
	name := "bulkhead"
	if cmd != nil {
		name = cmd.CommandPath()
	}
	fmt.Fprintf(c.stderr, "%s: %s\n", name, fmt.Sprintf(format, args...))
}

// sink is standard output; it remembers the first error, so that one check at
// the end finds a full disk or a reader that went away.
type sink struct {
	w   io.Writer
	err atomic.Pointer[error]
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if err != nil {
		s.err.CompareAndSwap(nil, &err)
	}
	return n, err
}

func (s *sink) failed() error {
	if p := s.err.Load(); p != nil {
		return *p
	}
	return nil
}

// file is the descriptor below, nil if there is none.
func (s *sink) file() *os.File {
	f, _ := s.w.(*os.File)
	return f
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "bulkhead",
		Short: "Run other people's agents on this node and keep them apart",
		Long: `Run other people's agents on this node and keep them apart.

A sandbox belongs to a tenant, lives under its limits, and may reach only what its
tenant's policy allows. Name one by its id, at least 4 first characters of the id,
TENANT:NAME, or its name alone if that is unique.`,
		Example: `  bulkhead run --tenant acme/vision --memory 256MiB alpine:3.22 echo hello
  bulkhead ls
  bulkhead explain web api.example.com:443
  bulkhead flows web -f --denied
  bulkhead node`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		Args:              known,
		RunE:              help,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return c.checkGlobals(cmd) },
	}
	root.SetIn(c.stdin)
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	root.SetFlagErrorFunc(flagError)
	f := root.PersistentFlags()
	f.StringVar(&c.socket, "socket", envOr("BULKHEAD_SOCKET", defaultSocket), "the agent's unix socket ($BULKHEAD_SOCKET)")
	f.StringVarP(&c.output, "output", "o", "table", "output form: table, or json (one object a line)")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print ids only, or nothing where there is no id")
	root.AddCommand(c.runCmd(), c.execCmd(), c.attachCmd(), c.lsCmd(), c.inspectCmd(), c.logsCmd(),
		c.stopCmd(), c.killCmd(), c.rmCmd(), c.waitCmd(), c.explainCmd(), c.flowsCmd(), c.policyCmd(), c.usageCmd(), c.imageCmd(),
		c.nodeCmd(), c.tenantCmd(), c.reloadCmd(), c.versionCmd())
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return root
}

func envOr(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func help(cmd *cobra.Command, _ []string) error { return cmd.Help() }

func (c *cli) checkGlobals(*cobra.Command) error {
	if c.output != "table" && c.output != "json" {
		return usagef("-o: %q is no output form; there are table and json", c.output)
	}
	return nil
}

func (c *cli) json() bool { return c.output == "json" }

// node is the agent. Nothing is sent until the first request.
func (c *cli) node() (nodev1.NodeClient, error) {
	if c.conn == nil {
		conn, err := c.dialAgent()
		if err != nil {
			return nil, err
		}
		c.conn = conn
	}
	return nodev1.NewNodeClient(c.conn), nil
}

// usageError is a command line that makes no sense; exit code 2.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// exitError ends with a code of its own; msg may be empty.
type exitError struct {
	code int
	msg  string
}

func (e *exitError) Error() string { return e.msg }

// known refuses a subcommand that does not exist.
func known(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(append(names, sub.Name()), sub.Aliases...)
		}
	}
	return usagef("unknown command %q%s; see %s --help", args[0], nearest(args[0], names), cmd.CommandPath())
}

// flagError is a flag that cobra could not read.
func flagError(cmd *cobra.Command, err error) error {
	msg := err.Error()
	if name, ok := strings.CutPrefix(msg, "unknown flag: --"); ok {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
		msg = fmt.Sprintf("unknown flag --%s%s", name, nearest("--"+name, names))
	}
	// What strconv says about a number is for programmers.
	if i := strings.Index(msg, ": strconv."); i >= 0 {
		msg = msg[:i] + ": not a whole number"
	}
	return usagef("%s; see %s --help", msg, cmd.CommandPath())
}

// args wants between least and most positional arguments; most of -1 is any
// number. what is how the help names them.
func args(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		form := strings.TrimSpace(cmd.CommandPath() + " " + what)
		if len(args) < least {
			return usagef("something is missing: %s", form)
		}
		return usagef("%q is one too many: %s", args[most], form)
	}
}

// nearest answers " (did you mean x?)" if one of names is close to s.
func nearest(s string, names []string) string {
	best, bestAt := "", 0.6
	slices.Sort(names)
	for _, n := range names {
		if sim := levenshtein.Similarity(s, n, levenshtein.NewParams().BonusPrefix(3)); sim >= bestAt && sim > 0 && n != best {
			if best == "" || sim > bestAt {
				best, bestAt = n, sim
			}
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}
