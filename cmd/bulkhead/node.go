// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (c *cli) nodeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "node",
		Aliases: []string{"info", "status"},
		Short:   "Report this node: what it has, what it cannot enforce, where its usage goes",
		Example: `  bulkhead node
  bulkhead node ls --gateway gw.example.com:7443 --ca ca.pem`,
		Args: known,
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			info, err := node.NodeInfo(cmd.Context(), &nodev1.NodeInfoRequest{})
			switch {
			case err != nil:
				return err
			case c.json():
				return render.JSON(c.stdout, info)
			case c.quiet:
				_, err := fmt.Fprintln(c.stdout, info.GetNodeId())
				return err
			}
			return render.Node(c.stdout, info)
		},
	}
	cmd.AddCommand(c.nodeLsCmd())
	return cmd
}

func (c *cli) nodeLsCmd() *cobra.Command {
	var g gatewayFlags
	cmd := &cobra.Command{
		Use:     "ls --gateway ADDR",
		Aliases: []string{"list"},
		Short:   "List the nodes that report to a gateway, and how far their usage has arrived",
		Example: `  bulkhead node ls --gateway unix:///run/bulkhead-gateway/gateway.sock`,
		Args:    args(0, 0, "--gateway ADDR"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := g.check(); err != nil {
				return err
			}
			if g.addr == "" {
				return usagef("--gateway is missing: a node knows only itself (bulkhead node)")
			}
			conn, err := c.dialGateway(g)
			if err != nil {
				return err
			}
			defer conn.Close()
			resp, err := gatewayv1.NewGatewayClient(conn).ListNodes(cmd.Context(), &gatewayv1.ListNodesRequest{})
			if err != nil {
				return err
			}
			return list(c, resp.GetNodes(), (*gatewayv1.NodeStatus).GetNodeId, render.Nodes)
		},
	}
	g.add(cmd.Flags())
	return cmd
}

// list prints things in the form that was asked for, in the order of their
// names.
func list[M proto.Message](c *cli, things []M, name func(M) string, table func(io.Writer, []M) error) error {
	slices.SortFunc(things, func(a, b M) int { return cmp.Compare(name(a), name(b)) })
	switch {
	case c.json():
		return render.JSONAll(c.stdout, things)
	case c.quiet:
		for _, t := range things {
			if _, err := fmt.Fprintln(c.stdout, name(t)); err != nil {
				return err
			}
		}
		return nil
	}
	return table(c.stdout, things)
}

func (c *cli) tenantCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "tenant",
		Aliases: []string{"tenants"},
		Short:   "Look at tenants",
		Args:    known,
		RunE:    help,
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List tenants with what they hold of their limits",
		Example: `  bulkhead tenant ls`,
		Args:    args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			resp, err := node.ListTenants(cmd.Context(), &nodev1.ListTenantsRequest{})
			if err != nil {
				return err
			}
			return list(c, resp.GetTenants(), (*nodev1.Tenant).GetPath, render.Tenants)
		},
	})
	return cmd
}

func (c *cli) reloadCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the agent read the tenant directory again",
		Long: `Have the agent read the tenant directory again. Policies of running sandboxes are replaced
at once. On any error nothing changes.`,
		Example: `  bulkhead reload`,
		Args:    args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			resp, err := node.Reload(cmd.Context(), &nodev1.ReloadRequest{})
			switch {
			case err != nil:
				return err
			case c.json():
				return render.JSON(c.stdout, resp)
			case c.quiet:
				return nil
			}
			_, err = fmt.Fprintf(c.stdout, "%d tenants read, policies of %d sandboxes replaced\n", resp.GetTenants(), resp.GetSandboxesUpdated())
			return err
		},
	}
}

func (c *cli) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the versions of this program and of the agent",
		Example: `  bulkhead version`,
		Args:    args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
			defer cancel()
			info, err := node.NodeInfo(ctx, &nodev1.NodeInfoRequest{})
			if c.json() {
				return render.JSONFields(c.stdout, render.Field{Name: "client", Value: version}, render.Field{Name: "agent", Value: info.GetVersion()})
			}
			agent := info.GetVersion() + " at " + c.socket
			if err != nil {
				agent = c.explainError(err)
			}
			_, err = fmt.Fprintf(c.stdout, "bulkhead  %s (%s/%s)\nagent     %s\n", version, runtime.GOOS, runtime.GOARCH, render.Clean(agent))
			return err
		},
	}
}

func (c *cli) imageCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "image",
		Aliases: []string{"images"},
		Short:   "Bring images to the node and list them",
		Args:    known,
		RunE:    help,
	}
	cmd.AddCommand(c.imageLsCmd(), c.imageImportCmd(), c.imagePullCmd())
	return cmd
}

func (c *cli) imageLsCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the images on the node",
		Example: `  bulkhead image ls`,
		Args:    args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			resp, err := node.ListImages(cmd.Context(), &nodev1.ListImagesRequest{})
			if err != nil {
				return err
			}
			return c.printImages(resp.GetImages())
		},
	}
}

func (c *cli) printImages(images []*nodev1.Image) error {
	return list(c, images, (*nodev1.Image).GetReference, render.Images)
}

func (c *cli) imagePullCmd() *cobra.Command {
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "pull REFERENCE",
		Short: "Have the node fetch an image from its registry",
		Example: `  bulkhead image pull registry.example.com/web:2
  bulkhead image pull --plain-http 10.20.0.5:5000/web:2`,
		Args: args(1, 1, "REFERENCE"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			busy := c.progress("pulling " + refs[0])
			resp, err := node.PullImage(cmd.Context(), &nodev1.PullImageRequest{Reference: refs[0], PlainHttp: plainHTTP})
			busy.done()
			if err != nil {
				return err
			}
			return c.printImages([]*nodev1.Image{resp.GetImage()})
		},
	}
	cmd.Flags().BoolVar(&plainHTTP, "plain-http", false, "the registry has no TLS")
	return cmd
}

func (c *cli) imageImportCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "import FILE",
		Aliases: []string{"load"},
		Short:   "Send an OCI or docker archive to the node",
		Long:    `Send an OCI or docker archive to the node. FILE is - for standard input.`,
		Example: `  bulkhead image import web.tar
  docker save web:2 | bulkhead image import -`,
		Args: args(1, 1, "FILE"),
		RunE: func(cmd *cobra.Command, files []string) error {
			images, err := c.importImage(cmd.Context(), files[0])
			if err != nil {
				return err
			}
			return c.printImages(images)
		},
	}
}

const importChunk = 256 << 10 // well below gRPC's 4 MiB

func (c *cli) importImage(ctx context.Context, name string) ([]*nodev1.Image, error) {
	if _, tty := terminal(asFile(c.stdin)); tty && name == "-" {
		return nil, usagef("standard input is a terminal; pipe an archive into it or name a file")
	}
	f, err := c.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	node, err := c.node()
	if err != nil {
		return nil, err
	}
	// Leaving with an error must not look to the agent like the archive's end.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := node.ImportImage(ctx)
	if err != nil {
		return nil, err
	}
	busy := c.progress("sending " + name)
	defer busy.done()
	buf, sent := make([]byte, importChunk), int64(0)
	for {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			if serr := stream.Send(&nodev1.ImportImageRequest{Chunk: buf[:n]}); serr != nil {
				break // the reason comes with the answer
			}
			sent += int64(n)
			busy.set(fmt.Sprintf("sending %s: %s", name, render.Size(sent)))
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			if sent == 0 {
				return nil, fmt.Errorf("%s is empty", nameOf(name))
			}
			busy.set("unpacking " + name)
			break
		}
		if err != nil {
			return nil, err
		}
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetImages(), err
}

func nameOf(file string) string {
	if file == "-" {
		return "standard input"
	}
	return file
}
