// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (c *cli) flowsCmd() *cobra.Command {
	var follow, denied, audit bool
	var last string
	cmd := &cobra.Command{
		Use:     "flows [flags] SANDBOX",
		Aliases: []string{"flow"},
		Short:   "Print what a sandbox has tried to reach, and what became of it",
		Long: `Print what a sandbox has tried to reach, and what became of it: the first packet of every
second under one rule, or dropped for one reason, and the names that were looked up. What
followed within the second has no line of its own; PACKETS and BYTES of the next line of
the same kind count it, whatever its destination.

The node keeps the last entries in memory, 1024 of a sandbox; a restart of the agent begins
a new log. Totals are in bulkhead policy status and are never lost.`,
		Example: `  bulkhead flows web
  bulkhead flows web -f --denied
  bulkhead flows web -n 20 --audit
  bulkhead flows web -f -o json | jq -r 'select(.lookup) | .lookup.name'`,
		Args:              args(1, 1, "[flags] SANDBOX"),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			req := &nodev1.FlowsRequest{Ref: refs[0], Follow: follow, Denied: denied, Audit: audit}
			var err error
			if req.Tail, err = parseTail(last); err != nil {
				return usagef("-n: %q is no number of entries", last)
			}
			node, err := c.node()
			if err != nil {
				return err
			}
			f := &flowReader{c: c, node: node, req: req}
			notice := func(msg string) { c.sayf(cmd, "%s", msg) }
			return c.outlast(cmd.Context(), notice, func() error { return f.read(cmd.Context()) })
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on until the sandbox has stopped")
	f.BoolVar(&denied, "denied", false, "only what was denied or refused")
	f.BoolVar(&audit, "audit", false, "only what passed because the policy is in audit mode")
	f.StringVarP(&last, "tail", "n", "all", "last entries only, or all")
	return cmd
}

// flowReader prints a flow log. After the agent was away it goes on with what
// is newer than what it has printed.
type flowReader struct {
	c    *cli
	node nodev1.NodeClient
	req  *nodev1.FlowsRequest

	begun  bool
	lastNs int64
}

func (r *flowReader) read(ctx context.Context) error {
	req, after := r.req, r.lastNs
	if r.begun {
		req = &nodev1.FlowsRequest{Ref: req.GetRef(), Follow: req.GetFollow(), Denied: req.GetDenied(), Audit: req.GetAudit()}
	}
	stream, err := r.node.Flows(ctx, req)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return err
		}
		if !r.begun {
			r.begun = true
			if herr := r.header(); herr != nil {
				return herr
			}
		}
		if end {
			return nil
		}
		at := max(m.GetFlow().GetTimeNs(), m.GetLookup().GetTimeNs())
		if at != 0 && at <= after {
			continue
		}
		r.lastNs = max(r.lastNs, at)
		if err := r.print(m); err != nil {
			return err
		}
	}
}

func (r *flowReader) header() error {
	if r.c.json() || r.c.quiet {
		return nil
	}
	_, err := io.WriteString(r.c.stdout, render.FlowHeader())
	return err
}

func (r *flowReader) print(m *nodev1.FlowsResponse) error {
	switch {
	case r.c.json():
		return render.JSON(r.c.stdout, m)
	case r.c.quiet:
		return nil
	}
	_, err := io.WriteString(r.c.stdout, render.Flow(m))
	return err
}
