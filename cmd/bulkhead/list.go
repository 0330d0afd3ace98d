// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

func (c *cli) lsCmd() *cobra.Command {
	var all, watch bool
	var tenant string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"ps", "list"},
		Short:   "List sandboxes",
		Example: `  bulkhead ls
  bulkhead ls -a --tenant acme
  bulkhead ls --watch -o json
  bulkhead rm $(bulkhead ls -aq --tenant acme/ci)`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			if watch {
				return c.watch(cmd, node, tenant, all)
			}
			resp, err := node.List(cmd.Context(), &nodev1.ListRequest{Tenant: tenant, All: all})
			if err != nil {
				return err
			}
			list := resp.GetSandboxes()
			sortSandboxes(list)
			return c.printSandboxes(list)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "stopped ones too")
	f.StringVar(&tenant, "tenant", "", "this tenant and all below it")
	f.BoolVar(&watch, "watch", false, "stay and print every change")
	return cmd
}

func sortSandboxes(list []*sandboxv1.Sandbox) {
	slices.SortFunc(list, func(a, b *sandboxv1.Sandbox) int {
		return cmp.Or(cmp.Compare(a.GetCreatedNs(), b.GetCreatedNs()), strings.Compare(a.GetId(), b.GetId()))
	})
}

func (c *cli) printSandboxes(list []*sandboxv1.Sandbox) error {
	switch {
	case c.json():
		return render.JSONAll(c.stdout, list)
	case c.quiet:
		for _, s := range list {
			if _, err := fmt.Fprintln(c.stdout, s.GetId()); err != nil {
				return err
			}
		}
		return nil
	}
	var rows [][]string
	for _, s := range list {
		rows = append(rows, render.SandboxRow(s))
	}
	return render.Table(c.stdout, render.SandboxHeader, rows)
}

// watcher prints what changes. After the agent was away it prints only what is
// different from what it has printed.
type watcher struct {
	c     *cli
	all   bool
	shown map[string]*sandboxv1.Sandbox // as last printed; by id
	begun bool                          // the first list has been printed
}

func (c *cli) watch(cmd *cobra.Command, node nodev1.NodeClient, tenant string, all bool) error {
	w := &watcher{c: c, all: all, shown: map[string]*sandboxv1.Sandbox{}}
	notice := func(msg string) { c.sayf(cmd, "%s", msg) }
	return c.outlast(cmd.Context(), notice, func() error { return w.once(cmd.Context(), node, tenant) })
}

func (w *watcher) once(ctx context.Context, node nodev1.NodeClient, tenant string) error {
	stream, err := node.Watch(ctx, &nodev1.WatchRequest{Tenant: tenant})
	if err != nil {
		return err
	}
	var first []*sandboxv1.Sandbox
	for synced := false; ; {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if s := m.GetSandbox(); s != nil {
			switch {
			case !synced && !m.GetDeleted():
				first = append(first, s)
			default:
				if err := w.show(s, m.GetDeleted()); err != nil {
					return err
				}
			}
		}
		if m.GetSynced() && !synced {
			synced = true
			if err := w.sync(first); err != nil {
				return err
			}
		}
	}
}

// sync takes the whole list.
func (w *watcher) sync(list []*sandboxv1.Sandbox) error {
	sortSandboxes(list)
	if !w.begun {
		w.begun = true
		if !w.c.json() && !w.c.quiet {
			if err := w.line(render.SandboxHeader); err != nil {
				return err
			}
		}
		if !w.all {
			list = slices.DeleteFunc(list, stopped)
		}
	}
	there := map[string]bool{}
	for _, s := range list {
		there[s.GetId()] = true
		if old := w.shown[s.GetId()]; (old == nil && !w.all && stopped(s)) || proto.Equal(old, s) {
			continue
		}
		if err := w.show(s, false); err != nil {
			return err
		}
	}
	for id, s := range w.shown {
		if !there[id] {
			if err := w.show(s, true); err != nil {
				return err
			}
		}
	}
	return nil
}

func stopped(s *sandboxv1.Sandbox) bool { return s.GetState() == sandboxv1.State_STATE_STOPPED }

// show prints one change. Without -a a stopped sandbox shows up when it stops,
// and its deletion does not.
func (w *watcher) show(s *sandboxv1.Sandbox, deleted bool) error {
	old := w.shown[s.GetId()]
	if !w.all && old == nil && (stopped(s) || deleted) {
		return nil
	}
	if deleted || !w.all && stopped(s) {
		delete(w.shown, s.GetId())
	} else {
		w.shown[s.GetId()] = s
	}
	switch {
	case w.c.json():
		return render.JSON(w.c.stdout, &nodev1.WatchResponse{Sandbox: s, Deleted: deleted})
	case w.c.quiet:
		if deleted {
			return nil
		}
		_, err := fmt.Fprintln(w.c.stdout, s.GetId())
		return err
	}
	row := render.SandboxRow(s)
	if deleted {
		row[slices.Index(render.SandboxHeader, "STATE")] = "deleted"
	}
	return w.line(row)
}

// widths of the columns of --watch, where the rows to come are not known.
var widths = []int{12, 20, 20, 28, 24, 5, 8, 16, 20}

func (w *watcher) line(cells []string) error {
	var b strings.Builder
	for i, cell := range cells {
		if cell = render.Clean(cell); cell == "" {
			cell = render.None
		}
		if i == len(cells)-1 {
			b.WriteString(cell + "\n")
			break
		}
		fmt.Fprintf(&b, "%-*s   ", widths[i], cell)
	}
	_, err := io.WriteString(w.c.stdout, b.String())
	return err
}

func (c *cli) inspectCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "get SANDBOX...",
		Aliases: []string{"inspect", "describe", "show"},
		Short:   "Report everything about sandboxes",
		Long: `Report everything about sandboxes: state and why it ended, limits, addresses, traffic,
what each rule let through, what was dropped and why, events, and what this node cannot
enforce for it. Values of environment variables are left out; -o json has them.`,
		Example: `  bulkhead get web
  bulkhead inspect -o json web | jq .sandbox.exit`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			printed := 0
			return c.each(cmd, refs, func(node nodev1.NodeClient, ref string) error {
				resp, err := node.Get(cmd.Context(), &nodev1.GetRequest{Ref: ref})
				if err != nil {
					return err
				}
				printed++
				switch {
				case c.json():
					return render.JSON(c.stdout, resp)
				case c.quiet:
					_, err := fmt.Fprintln(c.stdout, resp.GetSandbox().GetId())
					return err
				case printed > 1:
					if _, err := fmt.Fprintln(c.stdout); err != nil {
						return err
					}
				}
				return render.Report(c.stdout, resp)
			})
		},
	}
}
